"""A real engine falls asleep and wakes; only its weights, which cannot leave a CPU, are played."""

from __future__ import annotations

from pathlib import Path

from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, switched_on


def test_it_gives_everything_back_makes_no_step_and_answers_as_before(
    model: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    job = {
        "task": "asleep",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "arguments": {"max_num_seqs": 16, "enable_prefix_caching": True},
    }
    changes = switched_on(tmp_path, 64 * MIB, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        found = process.answer(200)

    assert found["before"] == found["again 1"] == found["again 2"] == found["after"] == plain
    name, said, asleep = found["without sleep mode"]
    assert (name, asleep) == ("EngineError", False), "refused before anything was paused"
    assert "--enable-sleep-mode" in said
    assert found["loaded"]["charge"] > found["loaded"]["pinned"]
    assert found["loaded"]["asleep"] == 0
    for level in "12":
        asleep, facts = found[f"asleep {level}"]
        assert asleep and facts["asleep"] == 1
        assert facts["charge"] == facts["created"] == facts["physical"] == facts["pinned"]
        assert found[f"waited {level}"]
        assert found[f"refused {level}"] == ["OutOfMemoryError", "there is no room", True]
        assert found[f"answer {level}"] == plain[0]
    assert (found["states 1"], found["states 2"]) == ([False], [True, False])
    assert found["log"] == [
        *("leave 1", "room None", "leave room", "room None", "come None"),
        *("leave 2", "room None", "leave room"),
        *("room ['weights']", "come ['weights']", "room ['kv_cache']", "come ['kv_cache']"),
    ]
