"""vLLM 0.8.4, which runs on GPUs only: its real classes, and its real engine around a toy model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import HERE, MIB, environment, switched_on
from versions import vllm_version

pytestmark = pytest.mark.skipif(
    not vllm_version().startswith("0.8."), reason="these classes are vLLM 0.8's"
)

PATCH = HERE.parents[1] / "engine_integration" / "scripts" / "kvcached-vllm-v0.8.4.patch"
SEEDS = 60
CASES = [
    {"caching": True, "budget": 256, "seed": 1, "requests": 24},
    {"caching": False, "budget": 96, "seed": 2, "requests": 24},
    {"caching": True, "budget": 64, "seed": 3, "requests": 20, "window": 64},
]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 997,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "torch_dtype": "float16",
}


def run(script: str, argument: str, *paths: Path, changes: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / script), argument],
        env=environment({"OMP_NUM_THREADS": "1", **changes}, *paths, HERE),
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_random_programs_on_the_block_pool_and_the_manager(tmp_path: Path) -> None:
    """Allocation, prefix hits, preemption, reclaim and resets, beside vLLM's own as the oracle."""
    counts = json.loads(run("classes_0_8_process.py", str(SEEDS), changes={}).splitlines()[-1])
    print(counts)
    for what in ("admitted", "refused", "short of memory", "hits", "preempted", "resets"):
        assert counts[what] > 20, counts
    assert counts["blocks evicted"] > 100 and counts["pages taken back"] > 100


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def toy(folder: Path, model: Path, changes: dict[str, str], *paths: Path, **more: Any) -> Any:
    folder.mkdir()
    answer = folder / "answer.json"
    job = {"model": str(model), "answer": str(answer), "cases": CASES, **more}
    (folder / "job.json").write_text(json.dumps(job))
    run("toy_run_0_8.py", str(folder / "job.json"), *paths, changes=changes)
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def plain(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What vLLM without kvcached answers, with memory for everything."""
    found = toy(tmp_path_factory.mktemp("plain") / "run", toy_model, {})
    assert all(facts["preemptions"] == 0 for facts in found)
    assert not any(facts["followers"] for facts in found)
    answers = [facts["answers"] for facts in found]
    assert len({tuple(tokens) for tokens in answers[0]}) > 20
    return answers


@pytest.mark.parametrize("layout", ["auto", "block"])
@pytest.mark.parametrize("capacity", [16 * MIB, 2 * MIB], ids=["roomy", "tight"])
def test_the_real_engine_answers_as_without_kvcached(
    toy_model: Path, plain: list[list[list[int]]], tmp_path: Path, layout: str, capacity: int
) -> None:
    changes = switched_on(tmp_path, capacity, KVCACHED_VIRTUAL=str(32 * MIB))
    found = toy(tmp_path / "ours", toy_model, {**changes, "KVCACHED_LAYOUT": layout})
    for case, facts, answers in zip(CASES, found, plain, strict=True):
        assert facts["answers"] == answers, case
        loaded, reset = facts["loaded"], facts["reset"]
        assert loaded["high_water"] <= loaded["capacity"] == capacity
        assert loaded["used_blocks"] == 1, "the null block"
        assert facts["maps"] > 4 and facts["most_running"] > 2
        assert (loaded["hits"] > 0) == case["caching"]
        assert reset["created"] == reset["charge"] <= reset["pinned"] + reset["page"]
    assert any(facts["preemptions"] > 0 for facts in found) == (capacity < 4 * MIB)


def test_an_engine_in_a_spawned_process_without_plugins_is_elastic(
    toy_model: Path, plain: list[list[list[int]]], tmp_path: Path
) -> None:
    """And it is woken when it is idle: the hook of its loop is there."""
    case = {**CASES[0], "requests": 10}
    changes = switched_on(
        tmp_path,
        16 * MIB,
        KVCACHED_VIRTUAL=str(32 * MIB),
        VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
    )
    found = toy(tmp_path / "ours", toy_model, changes, cases=[case], process=True)
    for ours, wanted in zip(found["answers"], plain[0], strict=False):
        assert ours[: len(wanted)] == wanted
    assert found["before"] > 2 * found["limit"]


def test_its_v0_engine_is_refused(toy_model: Path, tmp_path: Path) -> None:
    changes = {**switched_on(tmp_path, 16 * MIB), "VLLM_USE_V1": "0"}
    with pytest.raises(AssertionError, match="V0 engine, which this version chose"):
        toy(tmp_path / "ours", toy_model, changes, cases=[{**CASES[0], "budget": 2048}])


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed package, as links but for the files that the patch changes."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(
        Path(spec.origin).parent,
        folder / "vllm",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in re.findall(r"^--- a/(\S+)", PATCH.read_text(), re.MULTILINE):
        file = folder / name
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
    subprocess.run(["patch", "-p1", "-i", str(PATCH)], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("plugins", ["none", "kvcached"], ids=["patch alone", "patch and plugin"])
def test_a_patched_vllm_is_elastic_once(
    toy_model: Path,
    plain: list[list[list[int]]],
    patched: Path,
    tmp_path: Path,
    plugins: str,
) -> None:
    changes = switched_on(tmp_path, 16 * MIB, KVCACHED_VIRTUAL=str(32 * MIB), VLLM_PLUGINS=plugins)
    (facts,) = toy(tmp_path / "ours", toy_model, changes, patched, cases=CASES[:1])
    assert facts["answers"] == plain[0]
    assert facts["maps"] > 4 and facts["followers"] == 1


def test_a_patched_vllm_without_kvcached_switched_on_is_as_it_was(
    toy_model: Path, plain: list[list[list[int]]], patched: Path, tmp_path: Path
) -> None:
    (facts,) = toy(tmp_path / "ours", toy_model, {}, patched, cases=CASES[:1])
    assert facts["answers"] == plain[0]
    assert facts["followers"] == 0


# What vLLM's memory allocator, which its worker imports, links of the driver.
DRIVER = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRetain",
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
]
WORKER = """
import vllm.v1.worker.gpu_worker as gpu_worker
from kvcached.engines.vllm import classes, start
name = classes.qualified_name("worker", gpu_worker.Worker).rpartition(".")[2]
elastic = getattr(classes, name)
assert issubclass(elastic, gpu_worker.Worker) and elastic.__name__ == "ElasticWorker"
with start.without_memory_check():  # this version has none at that point
    pass
worker = elastic.__new__(elastic)
worker.init_gpu_memory = 5
start.expect_any_free_memory(worker)
assert worker.init_gpu_memory > 1 << 50
print("fits")
"""


def test_the_worker_for_gpus_is_what_the_adapter_counts_on(tmp_path: Path) -> None:
    """Imported where there is no driver: against a library of its names, as linkers use."""
    source = tmp_path / "names.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in DRIVER))
    library = tmp_path / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(["cc", *flags, str(source)], check=True)
    changes = switched_on(tmp_path, 16 * MIB, LD_LIBRARY_PATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment(changes), capture_output=True, text=True
    )
    assert done.returncode == 0 and "fits" in done.stdout, (done.stdout + done.stderr)[-4000:]
