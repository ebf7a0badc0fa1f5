"""SGLang 0.4.9: what differs from other versions."""

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
    **expects.allocators_0_4(expects.ALLOCATORS, expects.ALLOCATORS),
    f"{expects.ADDER}.add_one_req": "self, req, has_chunked_req",
}


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    counting = ("log_prefill_stats", "log_decode_stats", "get_load")
    return family_0_4.seams(config, counting, "free_pages")
