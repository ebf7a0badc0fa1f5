"""How much memory a model's weights take, as far as this machine can tell."""

from __future__ import annotations

from pathlib import Path

from kvcached.router.settings import ModelSettings

_SUFFIXES = (".safetensors", ".bin", ".gguf")


def size_of(model: ModelSettings) -> int:
    """Bytes, as the settings say or else as the files of its folder are; 0 where neither is known.

    A quantized or converted model may take more or less than its files: the settings are for that.
    """
    if model.load.weights is not None:
        return model.load.weights
    folder = Path(model.source)
    if not folder.is_dir():
        return 0
    sizes = dict.fromkeys(_SUFFIXES, 0)
    for path in folder.iterdir():
        if path.suffix in sizes:
            sizes[path.suffix] += path.stat().st_size
    return next((size for size in sizes.values() if size), 0)  # two forms hold the same weights
