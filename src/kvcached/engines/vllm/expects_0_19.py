"""What differs in vLLM 0.19 from what ``expects_0_24`` says of 0.24."""

from __future__ import annotations

from kvcached.engines.vllm import expects_0_24

FRONT = expects_0_24.FRONT
SCHEDULER = {
    **expects_0_24.SCHEDULER,
    "__init__": (
        "self, vllm_config, kv_cache_config, structured_output_manager, block_size, mm_registry=, "
        "include_finished_set=, log_stats="
    ),
    "schedule": "self",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__": (
        "self, kv_cache_config, max_model_len, hash_block_size, enable_caching=, use_eagle=, "
        "log_stats=, enable_kv_cache_events=, dcp_world_size=, pcp_world_size=, metrics_collector="
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "self, request, num_new_tokens, num_new_computed_tokens=, new_computed_blocks=, "
        "num_lookahead_tokens=, num_external_computed_tokens=, delay_cache_blocks=, "
        "num_encoder_tokens="
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.can_fit_full_sequence": (
        "self, request, num_new_computed_tokens=, new_computed_blocks=, "
        "num_external_computed_tokens=, num_encoder_tokens="
    ),
}
WORKER = expects_0_24.WORKER
ATTRIBUTES = {
    **expects_0_24.ATTRIBUTES,
    "manager": ("block_pool", "coordinator", "max_model_len"),
}
