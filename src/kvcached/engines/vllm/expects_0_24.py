"""What differs in vLLM 0.24 from what ``expects`` says of 0.32."""

from __future__ import annotations

from kvcached.engines.vllm import expects

FRONT = {
    **expects.FRONT,
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self, request_id, prompt, params, supported_tasks, arrival_time=, lora_request=, "
        "tokenization_kwargs=, trace_headers=, priority=, data_parallel_rank=, resumable="
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        "self, engine_core_outputs, engine_core_timestamp=, iteration_stats="
    ),
}
SCHEDULER = {
    **expects.SCHEDULER,
    "vllm.v1.core.block_pool:BlockPool.__init__": (
        "self, num_gpu_blocks, enable_caching, hash_block_size, enable_kv_cache_events=, "
        "metrics_collector="
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__": (
        "self, kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, "
        "max_num_batched_tokens=, enable_caching=, use_eagle=, log_stats=, "
        "enable_kv_cache_events=, dcp_world_size=, pcp_world_size=, metrics_collector=, watermark="
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "self, request, num_new_tokens, num_new_computed_tokens=, new_computed_blocks=, "
        "num_lookahead_tokens=, num_external_computed_tokens=, delay_cache_blocks=, "
        "num_encoder_tokens=, full_sequence_must_fit=, reserved_blocks=, has_scheduled_reqs="
    ),
}
WORKER = expects.WORKER
ATTRIBUTES = expects.ATTRIBUTES
