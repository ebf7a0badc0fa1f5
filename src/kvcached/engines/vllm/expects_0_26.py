"""What differs in vLLM 0.26 from what ``expects_0_24`` says of 0.24."""

from __future__ import annotations

from kvcached.engines.vllm import expects_0_24

FRONT = expects_0_24.FRONT
SCHEDULER = {
    **expects_0_24.SCHEDULER,
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__": (
        "self, kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, "
        "max_in_flight_tokens=, enable_caching=, use_eagle=, log_stats=, "
        "enable_kv_cache_events=, dcp_world_size=, pcp_world_size=, metrics_collector=, watermark="
    ),
}
WORKER = expects_0_24.WORKER
ATTRIBUTES = expects_0_24.ATTRIBUTES
