"""Attention that takes the strides of block-outermost tensors: asked for each layer of a model."""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from kvcached.engines.registry import OFF
from kvcached.errors import EngineError


def check(vllm_config: Any, tensors: Any) -> None:
    """Raises EngineError where a layer's attention backend is not one that was seen to work."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    backends = {layer.get_attn_backend() for layer in layers.values()}
    with set_current_vllm_config(vllm_config):  # backends ask it for the layout
        wrong = sorted(
            f"{backend.get_name()} ({why})"
            for backend in backends
            if (why := tensors.refusal(backend))
        )
    if wrong:
        raise EngineError(
            f"kvcached does not support the attention backend {', '.join(wrong)}. Supported: "
            f"{', '.join(sorted(tensors.BACKENDS))} (--attention-backend chooses). {OFF}"
        )
