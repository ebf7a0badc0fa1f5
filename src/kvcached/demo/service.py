"""What `kvcached serve` offers without a file: the demo's two models under the demo's budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcached.demo.models import make_models
from kvcached.demo.servers import ENGINE_ENVIRONMENT
from kvcached.demo.setups import BLOCK_TOKENS, DEFAULT_BUDGET, MAX_MODEL_TOKENS

DEVICE = "host:demo"
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce-eager": True,
    "block-size": BLOCK_TOKENS,
    "max-model-len": MAX_MODEL_TOKENS,
    "max-num-seqs": 128,
}


def demo_settings(folder: Path) -> dict[str, Any]:
    """Settings for two models, which are made under ``folder`` if they are not there. Both start
    with their first request. Raises ModelError.
    """
    models = make_models(folder)
    aliases = {"smollm2-135m": ["default"]}
    return {
        "memory": {"device": DEVICE, "capacity": DEFAULT_BUDGET},
        "environment": dict(ENGINE_ENVIRONMENT),
        "models": [
            {
                "name": model.name,
                "aliases": aliases.get(model.name, []),
                "model": str(model.path.absolute()),
                "arguments": ARGUMENTS,
                "sleep": {"after_s": 300, "how": "stop"},
            }
            for model in models
        ],
    }
