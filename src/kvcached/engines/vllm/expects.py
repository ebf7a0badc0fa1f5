"""What the adapters count on in vLLM 0.32: the parameters of what kvcached replaces, overrides or
calls (``=`` marks a default), and the attributes of what it reads. ``selftest`` compares.

The tables of other versions (``expects_0_8`` ...) say what differs from these.
"""

from __future__ import annotations

_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
FRONT = {
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self, usage_context=, headless=",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self, request_id, prompt, params, supported_tasks, arrival_time=, lora_request=, "
        "tokenization_kwargs=, trace_headers=, priority=, data_parallel_rank=, resumable=, "
        "session_id=, kv_hints="
    ),
    "vllm.v1.engine.core:EngineCore.__init__": (
        "self, vllm_config, executor_class, log_stats, executor_fail_callback=, "
        "include_finished_set="
    ),
    "vllm.v1.engine.core:EngineCore.add_request": "self, request, request_wave=",
    "vllm.v1.engine.core:EngineCore.abort_requests": "self, request_ids",
    "vllm.v1.engine.core:EngineCore.reset_prefix_cache": (
        "self, reset_running_requests=, reset_connector="
    ),
    "vllm.v1.engine.core:EngineCore.sleep": "self, level=, mode=",
    "vllm.v1.engine.core:EngineCore.wake_up": "self, tags=",
    "vllm.v1.executor.abstract:Executor.sleep": "self, level=",
    "vllm.v1.executor.abstract:Executor.wake_up": "self, tags=",
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop": "self",
    "vllm.v1.engine.core_client:MPClient.shutdown": "self, timeout=",
    f"{_OUTPUTS}.process_outputs": (
        "self, engine_core_outputs, engine_core_timestamp=, iteration_stats=, weight_version="
    ),
    f"{_OUTPUTS}.abort_requests": "self, request_ids, internal",
    "vllm.v1.engine.output_processor:RequestOutputCollector.put": "self, output",
}

_POOL = "vllm.v1.core.block_pool:BlockPool"
_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
SCHEDULER = {
    "__init__": (
        "self, vllm_config, kv_cache_config, structured_output_manager, block_size, "
        "hash_block_size=, mm_registry=, include_finished_set=, log_stats="
    ),
    "schedule": "self, throttle_prefills=",
    "update_from_output": "self, scheduler_output, model_runner_output",
    "add_request": "self, request",
    "finish_requests": "self, request_ids, finished_status",
    "reset_prefix_cache": "self, reset_running_requests=, reset_connector=",
    "has_requests": "self",
    "get_num_unfinished_requests": "self",
    "shutdown": "self",
    f"{_POOL}.__init__": (
        "self, num_gpu_blocks, enable_caching, hash_block_size, enable_kv_cache_events=, "
        "metrics_collector=, medium="
    ),
    f"{_POOL}.get_new_blocks": "self, num_blocks",
    f"{_POOL}.touch": "self, blocks",
    f"{_POOL}.free_blocks": "self, ordered_blocks",
    f"{_POOL}.reset_prefix_cache": "self",
    f"{_POOL}.get_num_free_blocks": "self",
    f"{_POOL}.get_usage": "self",
    f"{_POOL}._maybe_evict_cached_block": "self, block",
    f"{_MANAGER}.__init__": (
        "self, kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, "
        "max_in_flight_tokens=, enable_caching=, use_eagle=, num_prefill_lookahead=, log_stats=, "
        "enable_kv_cache_events=, dcp_world_size=, pcp_world_size=, metrics_collector=, "
        "watermark=, enable_mamba_shared_prefix_checkpoint="
    ),
    f"{_MANAGER}.allocate_slots": (
        "self, request, num_new_tokens, num_new_computed_tokens=, new_computed_blocks=, "
        "num_lookahead_tokens=, num_external_computed_tokens=, delay_cache_blocks=, "
        "num_encoder_tokens=, full_sequence_must_fit=, reserved_blocks=, has_scheduled_reqs=, "
        "skip_zeroing_group_ids="
    ),
}

WORKER = {
    "init_device": "self",
    "determine_available_memory": "self",
    "initialize_from_config": "self, kv_cache_config",
    "compile_or_warm_up_model": "self",
    "execute_model": "self, scheduler_output",
    "sleep": "self, level=",
    "wake_up": "self, tags=",
}

ATTRIBUTES = {
    "scheduler": (
        "kv_cache_manager",
        "requests",
        "running",
        "waiting",
        "max_num_running_reqs",
        "max_num_scheduled_tokens",
    ),
    "manager": ("block_pool", "coordinator", "max_model_len", "watermark_blocks"),
    "pool": ("blocks", "free_block_queue", "null_block", "num_gpu_blocks"),
    "block": ("block_id", "ref_cnt", "is_null", "_block_hash"),
    "worker": ("vllm_config", "cache_config", "model_runner", "device", "rank", "is_driver_worker"),
    "kv_cache_config": ("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
}
