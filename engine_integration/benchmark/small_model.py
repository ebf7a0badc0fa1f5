#!/usr/bin/env python3
"""Makes the small model of the demo, SmolLM2-135M-Instruct, in a folder: for machines without a
GPU. Its configuration is written so that old versions of transformers read it too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvcached.demo.models import make_models


def for_old_readers(folder: Path) -> None:
    """Adds what transformers 4 calls otherwise than 5; both ignore the other's words."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokenizer, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where; smollm2-135m is made in it")
    folder = parser.parse_args().folder
    model, _ = make_models(folder)
    for_old_readers(model.path)
    print(model.path)


if __name__ == "__main__":
    main()
