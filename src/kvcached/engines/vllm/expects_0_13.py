"""What differs in vLLM 0.13 from what ``expects_0_19`` says of 0.19."""

from __future__ import annotations

from kvcached.engines.vllm import expects_0_19

FRONT = {
    **expects_0_19.FRONT,
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self, request_id, prompt, params, arrival_time=, lora_request=, tokenization_kwargs=, "
        "trace_headers=, priority=, data_parallel_rank="
    ),
    "vllm.v1.engine.core:EngineCore.__init__": (
        "self, vllm_config, executor_class, log_stats, executor_fail_callback="
    ),
    "vllm.v1.engine.core:EngineCore.sleep": "self, level=",
    "vllm.v1.engine.core_client:MPClient.shutdown": "self",
    "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": "self, request_ids",
}
SCHEDULER = {
    **expects_0_19.SCHEDULER,
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "self, request, num_new_tokens, num_new_computed_tokens=, new_computed_blocks=, "
        "num_lookahead_tokens=, delay_cache_blocks=, num_encoder_tokens="
    ),
}
del SCHEDULER["vllm.v1.core.kv_cache_manager:KVCacheManager.can_fit_full_sequence"]
WORKER = expects_0_19.WORKER
ATTRIBUTES = expects_0_19.ATTRIBUTES
