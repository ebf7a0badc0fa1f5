"""Which attention backend each layer of a loaded model uses (vLLM 0.13 and newer)."""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase


def used_backends(worker: Any) -> dict[str, Any]:
    """The backend of each attention layer, by the layer's name."""
    layers = get_layers_from_vllm_config(worker.vllm_config, AttentionLayerBase)
    return {name: layer.get_attn_backend() for name, layer in layers.items()}
