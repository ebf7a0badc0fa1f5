"""Children that an engine forks neither drop its claim nor keep it alive after its death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, switched_on, wait_until

from kvcached.demo.sampler import SessionWatch
from kvcached.ledger import Ledger


def test_forked_children_hold_nothing(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    job = {
        "task": "fork",
        "model": str(model),
        "prompts": PROMPTS[:6],
        "max_tokens": MAX_TOKENS,
        "arguments": {"enable_prefix_caching": True},
    }
    changes = switched_on(tmp_path, 32 * MIB, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        result = process.answer(200)
        assert result["outputs"] == [plain[:6], plain[:6]]
        place = (tmp_path / "ledger", changes["KVCACHED_DEVICE"])
        with Ledger.open(*place, create=False) as ledger:
            assert ledger.reap() == 0, "a child that ended has not dropped the owner's claim"
            (account,) = ledger.snapshot().accounts
            assert account.owner_alive and account.charge == result["loaded"]["charge"] > 2 * MIB
            process.process.send_signal(signal.SIGKILL)
            process.process.wait()
            for child in result["children"]:
                os.kill(child, 0)  # the children live on
            ledger.reap()
            assert ledger.snapshot().accounts == ()
            assert ledger.snapshot().free == 32 * MIB
        watch = SessionWatch(process.process.pid)
        wait_until(lambda: watch.physical_bytes() == 0, 10, "no memory is held")
