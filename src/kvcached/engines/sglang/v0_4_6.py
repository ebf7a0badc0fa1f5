"""SGLang 0.4.6: what differs from other versions."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.sglang import expects, family_0_4
from kvcached.engines.sglang.family_0_4 import Cache, arguments
from kvcached.engines.sglang.parts import TOGETHER

__all__ = ["EXPECTS", "PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu",)
EXPECTS = {
    **expects.V0_4,
    **expects.allocators_0_4(expects.POOLS, "sglang.srt.mem_cache.paged_allocator"),
    f"{expects.ADDER}.add_one_req": "self, req, has_chunked_req, enable_hierarchical_cache=",
}


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    counting = ("log_prefill_stats", "log_decode_stats")
    return family_0_4.seams(config, counting, "free_slots")
