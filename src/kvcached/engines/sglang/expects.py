"""What kvcached counts on in SGLang: the parameters of the functions that it replaces, overrides or
calls (``=`` marks a default). ``selftest`` compares.

What versions have in common; each adapter adds its own to one of these.
"""

from __future__ import annotations

from collections.abc import Mapping

SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
TREE = "sglang.srt.mem_cache.radix_cache:RadixCache"
POOLS = "sglang.srt.mem_cache.memory_pool"
ALLOCATORS = "sglang.srt.mem_cache.allocator"


def of(owner: str, methods: Mapping[str, str]) -> dict[str, str]:
    """The methods of a class by their full names."""
    return {f"{owner}.{name}": parameters for name, parameters in methods.items()}


_ALLOCATOR = {
    "alloc": "self, need_size",
    "free": "self, free_index",
    **dict.fromkeys(("available_size", "free_group_begin", "free_group_end", "clear"), "self"),
}


def allocators_0_4(tokens: str, paged: str) -> dict[str, str]:
    """Both allocators of 0.4, from these modules."""
    return {
        **of(
            f"{tokens}:TokenToKVPoolAllocator",
            {**_ALLOCATOR, "__init__": "self, size, dtype, device, kvcache"},
        ),
        **of(
            f"{paged}:PagedTokenToKVPoolAllocator",
            {
                **_ALLOCATOR,
                "__init__": "self, size, page_size, dtype, device, kvcache",
                "alloc_extend": "self, prefix_lens, seq_lens, last_loc, extend_num_tokens",
                "alloc_decode": "self, seq_lens, last_loc",
            },
        ),
    }


_RANKS = {"sglang.srt.distributed.parallel_state:get_tp_group": ""}

V0_4 = {
    **_RANKS,
    **of(
        SCHEDULER,
        {
            "__init__": "self, server_args, port_args, gpu_id, tp_rank, pp_rank, dp_rank",
            "get_next_batch_to_run": "self",
            "run_batch": "self, batch",
            "process_batch_result": "self, batch, result, launch_done=",
        },
    ),
    f"{ADDER}._lock_node": "self, last_node",
    **of(
        BATCH,
        {
            "check_decode_mem": "self, buf_multiplier=",
            "retract_decode": "self, server_args",
            "filter_batch": "self, chunked_req_to_exclude=, keep_indices=",
            "prepare_for_decode": "self",
        },
    ),
    "sglang.srt.managers.schedule_batch:Req.reset_for_retract": "self",
    f"{POOLS}:MHATokenToKVPool._create_buffers": "self",
    f"{POOLS}:MLATokenToKVPool.__init__": (
        "self, size, page_size, dtype, kv_lora_rank, qk_rope_head_dim, layer_num, device, "
        "enable_memory_saver, start_layer=, end_layer="
    ),
    **of(TREE, {"evict": "self, num_tokens", "evictable_size": "self"}),
    "sglang.srt.model_executor.model_runner:ModelRunner.profile_max_num_token": (
        "self, total_gpu_memory"
    ),
}

V0_5 = {
    **_RANKS,
    f"{SCHEDULER}.run_batch": "self, batch, pp_proxy_tensors=",
    f"{SCHEDULER}.process_batch_result": "self, batch, result",
    f"{ADDER}.add_one_req": "self, req, has_chunked_req, truncation_align_size",
    f"{BATCH}.check_decode_mem": "self, selected_indices=",
    f"{BATCH}.new_tokens_required_next_decode": "self, selected_indices=",
    **of(
        f"{ALLOCATORS}:TokenToKVPoolAllocator",
        {**_ALLOCATOR, "__init__": "self, size, dtype, device, kvcache, need_sort"},
    ),
    **of(
        f"{ALLOCATORS}:PagedTokenToKVPoolAllocator",
        {
            **_ALLOCATOR,
            "__init__": "self, size, page_size, dtype, device, kvcache, need_sort",
            "alloc_decode": "self, seq_lens, seq_lens_cpu, last_loc",
        },
    ),
    f"{POOLS}:MLATokenToKVPool._create_buffers": "self",
    **of(TREE, {"evict": "self, params", "evictable_size": "self"}),
}

_EXTEND = "self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens"

V0_5_10 = {
    **V0_5,
    **of(
        SCHEDULER,
        {
            "__init__": (
                "self, server_args, port_args, gpu_id, tp_rank, moe_ep_rank, pp_rank, "
                "attn_cp_rank, moe_dp_rank, dp_rank"
            ),
            "get_next_batch_to_run": "self",
        },
    ),
    f"{ADDER}._lock_node": "self, last_node",
    **of(
        BATCH,
        {
            "retract_decode": "self, server_args",
            "release_req": "self, idx, remaing_req_count, server_args",
            "filter_batch": "self, chunked_req_to_exclude=, keep_indices=, v1_spec_info_filtered=",
        },
    ),
    f"{ALLOCATORS}:PagedTokenToKVPoolAllocator.alloc_extend": _EXTEND,
    f"{POOLS}:MHATokenToKVPool._create_buffers": "self",
}

V0_5_15 = {
    **V0_5_10,
    f"{BATCH}.filter_batch": "self, chunked_req_to_exclude=, keep_indices=",
    f"{ALLOCATORS}:PagedTokenToKVPoolAllocator.alloc_extend": f"{_EXTEND}, num_new_pages=",
}

V0_5_23 = {
    **V0_5,
    **of(
        SCHEDULER,
        {
            "__init__": "self, server_args, port_args",
            "get_next_batch_to_run": "self, running_batch, last_batch",
        },
    ),
    f"{ADDER}._lock_node": "self, last_node, *, lock_host=",
    **of(
        BATCH,
        {
            "retract_decode": "self",
            "release_req": "self, idx, remaing_req_count, offload_kv=",
            "filter_batch": "self, reqs_to_exclude=, keep_indices=",
        },
    ),
    **of(
        f"{ALLOCATORS}:PagedTokenToKVPoolAllocator",
        {
            "alloc_extend": f"{_EXTEND}, num_new_pages=",
            "get_all_free_pages": "self",
            "_release_page_ids": "self, *page_ids",
        },
    ),
    f"{POOLS}:MHATokenToKVPool._create_buffers_normal": "self",
    f"{POOLS}:MHATokenToKVPool._kv_buffer_shapes": "self",
    f"{TREE}.evict_for_alloc": "self, params, *, allocation_reclaim_satisfied=",
}
