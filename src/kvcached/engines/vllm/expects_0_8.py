"""What the adapter counts on in vLLM 0.8.4; see ``expects``."""

from __future__ import annotations

from kvcached.engines.vllm import expects

FRONT = {
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self, usage_context=",
    "vllm.v1.engine.processor:Processor.process_inputs": (
        "self, request_id, prompt, params, arrival_time=, lora_request=, trace_headers=, "
        "prompt_adapter_request=, priority="
    ),
    "vllm.v1.engine.core:EngineCore.__init__": "self, vllm_config, executor_class, log_stats",
    "vllm.v1.engine.core:EngineCore.step": "self",
    "vllm.v1.engine.core:EngineCore.add_request": "self, request",
    "vllm.v1.engine.core:EngineCore.abort_requests": "self, request_ids",
    "vllm.v1.engine.core:EngineCore.reset_prefix_cache": "self",
    "vllm.v1.engine.core:EngineCore.shutdown": "self",
    "vllm.v1.engine.core:EngineCore.sleep": "self, level=",
    "vllm.v1.engine.core:EngineCore.wake_up": "self, tags=",
    "vllm.executor.executor_base:ExecutorBase.sleep": "self, level=",
    "vllm.executor.executor_base:ExecutorBase.wake_up": "self, tags=",
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop": "self",
}

_POOL = "vllm.v1.core.block_pool:BlockPool"
_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"
SCHEDULER = {
    "__init__": (
        "self, scheduler_config, model_config, cache_config, lora_config, kv_cache_config, "
        "structured_output_manager, speculative_config=, mm_registry=, include_finished_set=, "
        "log_stats="
    ),
    "schedule": "self",
    "update_from_output": "self, scheduler_output, model_runner_output",
    "add_request": "self, request",
    "finish_requests": "self, request_ids, finished_status",
    "reset_prefix_cache": "self",
    "has_requests": "self",
    "get_num_unfinished_requests": "self",
    f"{_POOL}.__init__": "self, num_gpu_blocks, enable_caching",
    f"{_POOL}.get_new_blocks": "self, num_blocks",
    f"{_POOL}.touch": "self, blocks",
    f"{_POOL}.free_blocks": "self, ordered_blocks",
    f"{_POOL}.reset_prefix_cache": "self",
    f"{_POOL}.get_num_free_blocks": "self",
    f"{_POOL}.get_usage": "self",
    f"{_POOL}._maybe_evict_cached_block": "self, block",
    f"{_QUEUE}.popleft": "self",
    f"{_QUEUE}.remove": "self, block",
    f"{_QUEUE}.append": "self, block",
    f"{_MANAGER}.__init__": (
        "self, kv_cache_config, max_model_len, enable_caching=, caching_hash_algo=, "
        "num_preallocate_tokens=, log_stats="
    ),
    f"{_MANAGER}.allocate_slots": (
        "self, request, num_tokens, new_computed_blocks=, num_lookahead_tokens="
    ),
}
WORKER = {
    **expects.WORKER,
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache": "self, kv_cache_config",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_kv_cache_spec": "self",
}
ATTRIBUTES = {
    **expects.ATTRIBUTES,
    "manager": ("block_pool", "block_size", "max_model_len", "req_to_blocks"),
    "block": ("block_id", "ref_cnt", "_block_hash"),
    "kv_cache_config": ("num_blocks", "tensors", "kv_cache_groups"),
}
