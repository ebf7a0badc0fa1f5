"""What `kvcached serve` offers without a file."""

from __future__ import annotations

import json
from pathlib import Path

from kvcached.demo.service import demo_settings
from kvcached.router.settings import ServeSettings

CONFIG = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 100,
}


def test_the_demos_models_under_its_budget(tmp_path: Path) -> None:
    for name in ("smollm2-135m", "random-llama"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    settings = ServeSettings.model_validate(demo_settings(tmp_path))
    assert [model.name for model in settings.models] == ["smollm2-135m", "random-llama"]
    assert all(Path(model.source).is_dir() for model in settings.models)
    chat = settings.model_named("default")
    assert chat is settings.models[0] and settings.memory.capacity == 224 << 20
