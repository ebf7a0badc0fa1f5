"""The lines of models: bounds, order, engines that are not ready, and devices short of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from kvcached.router import admission
from kvcached.router.admission import Policy
from kvcached.router.errors import ApiError
from kvcached.router.fixed import FixedUpstream
from kvcached.router.line import Line, Ticket
from kvcached.router.queues import BATCH_TOKENS, LEAST_TOKENS, MIN_HOLD_S, PATIENCE, Gate
from kvcached.router.settings import QueueSettings, SloSettings
from kvcached.router.upstream import State, UpstreamDown


class Sleeper(FixedUpstream):
    """An engine that wakes, or fails, when the test says so."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "http://127.0.0.1:1")
        self.state = State.ASLEEP
        self.calls = 0
        self.failure: UpstreamDown | None = None
        self._changed = asyncio.Event()

    def becomes(self, state: State, failure: UpstreamDown | None = None) -> None:
        self.state, self.failure = state, failure
        self._changed.set()
        self._changed = asyncio.Event()

    async def ready(self) -> None:
        self.calls += 1
        while self.state is not State.READY:
            if self.failure is not None:
                raise self.failure
            await self._changed.wait()


def line(name: str, upstream: FixedUpstream | None = None, **queue: Any) -> Line:
    slo = SloSettings(ttft_ms=1000, ttft_ms_per_1k_prompt_tokens=0)
    return Line(upstream or FixedUpstream(name, ""), QueueSettings(**queue), slo)


class Crowd:
    """Requests at a gate, by the order in which they were let through."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.through: list[str] = []
        self.refused: dict[str, ApiError] = {}
        self.tickets: dict[str, Ticket] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def comes(self, who: str, to: Line, tokens: int = 2000) -> None:
        ticket = self.tickets[who] = self.gate.enter(to, tokens)
        self.tasks[who] = asyncio.create_task(self._waits(who, ticket))
        await settle()

    async def _waits(self, who: str, ticket: Ticket) -> None:
        try:
            await self.gate.turn(ticket)
            self.through.append(who)
        except ApiError as error:
            self.refused[who] = error
            self.gate.leave(ticket)
        except asyncio.CancelledError:
            self.gate.leave(ticket)
            raise

    async def goes_away(self, who: str) -> None:
        self.tasks[who].cancel()
        await settle()

    async def is_over(self, who: str) -> None:
        self.gate.leave(self.tickets[who])
        await settle()

    async def speaks(self, who: str) -> None:
        self.gate.first_token(self.tickets[who])
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@contextlib.contextmanager
def closed(gate: Gate) -> Iterator[Crowd]:
    try:
        yield Crowd(gate)
    finally:
        gate.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()
        await settle()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(main())


def test_a_line_is_first_in_first_out_and_bounded() -> None:
    async def test() -> None:
        a = line("a", max_running=2, max_waiting=2)
        with closed(Gate([a])) as crowd:
            for who in "12345":
                with contextlib.suppress(ApiError):
                    await crowd.comes(who, a)
            assert crowd.through == ["1", "2"] and a.running == 2 == a.upstream.used  # type: ignore[attr-defined]
            with pytest.raises(ApiError) as refused:
                crowd.gate.enter(a, 1)
            assert refused.value.status == 429 and refused.value.retry_after_s >= 1  # type: ignore[operator]
            await crowd.is_over("2")
            assert crowd.through == ["1", "2", "3"]
            await crowd.goes_away("4")
            await crowd.is_over("1")
            await crowd.is_over("3")
            assert (a.running, len(a.waiting), a.upstream.used) == (0, 0, 0)  # type: ignore[attr-defined]

    run(test)


def test_no_line_at_all() -> None:
    async def test() -> None:
        a = line("a", max_running=1, max_waiting=0)
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
            with pytest.raises(ApiError):
                crowd.gate.enter(a, 1)
            await crowd.is_over("1")
            await crowd.comes("2", a)
            assert crowd.through == ["1", "2"]

    run(test)


def test_one_line_does_not_hold_up_another() -> None:
    async def test() -> None:
        a, b = line("a", max_running=1), line("b", max_running=1)
        with closed(Gate([a, b])) as crowd:
            for who, to in (("a1", a), ("a2", a), ("b1", b)):
                await crowd.comes(who, to)
            assert crowd.through == ["a1", "b1"]

    run(test)


def test_requests_wait_while_their_model_wakes_and_keep_their_order() -> None:
    async def test() -> None:
        sleeper = Sleeper("a")
        a = line("a", sleeper, max_running=3)
        with closed(Gate([a])) as crowd:
            for who in "1234":
                await crowd.comes(who, a)
            assert crowd.through == [] and sleeper.used == 0
            assert sleeper.calls == 1  # one wait for all of them
            await crowd.goes_away("1")
            sleeper.becomes(State.WAKING)
            await settle()
            assert crowd.through == []
            sleeper.becomes(State.READY)
            await settle()
            assert crowd.through == ["2", "3", "4"] and sleeper.used == 3

    run(test)


def test_a_model_that_falls_asleep_in_between_is_woken_again() -> None:
    async def test() -> None:
        sleeper = Sleeper("a")
        sleeper.becomes(State.READY)
        a = line("a", sleeper, max_running=1)
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
            await crowd.comes("2", a)
            sleeper.becomes(State.ASLEEP)
            await crowd.is_over("1")
            assert crowd.through == ["1"] and sleeper.calls == 1
            sleeper.becomes(State.READY)
            await settle()
            assert crowd.through == ["1", "2"]

    run(test)


def test_when_a_model_fails_its_requests_are_refused_and_the_next_is_tried() -> None:
    async def test() -> None:
        sleeper = Sleeper("a")
        a = line("a", sleeper)
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
            await crowd.comes("2", a)
            sleeper.becomes(State.FAILED, UpstreamDown("exit 1", 7.0))
            await settle()
            assert {e.status for e in crowd.refused.values()} == {503}
            assert (
                crowd.refused["2"].retry_after_s == 7.0 and "exit 1" in crowd.refused["2"].message
            )
            assert not a.waiting
            sleeper.becomes(State.READY)
            await crowd.comes("3", a)
            assert crowd.through == ["3"]

    run(test)


def test_a_wait_has_an_end() -> None:
    async def test() -> None:
        sleeper = Sleeper("a")
        a = line("a", sleeper, timeout_s=0.05)
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
            await asyncio.sleep(0.1)
            error = crowd.refused["1"]
            assert error.status == 504 and "asleep" in error.message
            assert not a.waiting

    run(test)


def test_a_service_that_ends_refuses_who_waits() -> None:
    async def test() -> None:
        a = line("a", Sleeper("a"))
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
        await settle()
        assert crowd.refused["1"].status == 503

    run(test)


SHORT = {"a": "host:x", "b": "host:x"}


def test_where_memory_is_short_one_prompt_is_computed_after_the_other() -> None:
    async def test() -> None:
        a, b, c = line("a"), line("b"), line("c")
        with closed(Gate([a, b, c])) as crowd:
            crowd.gate.follow(SHORT)
            for who, to in (("a1", a), ("a2", a), ("b1", b), ("c1", c)):
                await crowd.comes(who, to)
            assert crowd.through == ["a1", "c1"]  # c lies elsewhere
            await crowd.speaks("a1")
            assert crowd.through == ["a1", "c1", "a2"]
            await crowd.is_over("a1")
            assert crowd.through == ["a1", "c1", "a2"]
            await crowd.is_over("a2")  # without a word
            assert crowd.through[-1] == "b1"

    run(test)


def test_short_prompts_are_computed_together() -> None:
    async def test() -> None:
        a, b = line("a"), line("b")
        with closed(Gate([a, b])) as crowd:
            crowd.gate.follow(SHORT)
            for number in range(BATCH_TOKENS // LEAST_TOKENS + 2):
                await crowd.comes(str(number), (a, b)[number % 2], 10)
            assert len(crowd.through) == BATCH_TOKENS // LEAST_TOKENS
            await crowd.speaks("0")
            assert len(crowd.through) == BATCH_TOKENS // LEAST_TOKENS + 1
            await crowd.comes("long", a, 3 * BATCH_TOKENS)
            for who in tuple(crowd.through):
                await crowd.is_over(who)
            assert crowd.through[-1] == "33"
            await crowd.is_over("33")
            assert crowd.through[-1] == "long"  # alone
            await crowd.comes("last", b, 10)
            assert crowd.through[-1] == "long"

    run(test)


def test_the_end_of_a_shortage_lets_everybody_through() -> None:
    async def test() -> None:
        a, b = line("a"), line("b", max_running=1)
        with closed(Gate([a, b])) as crowd:
            crowd.gate.follow(SHORT)
            for who, to in (("a1", a), ("a2", a), ("b1", b), ("b2", b)):
                await crowd.comes(who, to)
            assert crowd.through == ["a1"]
            crowd.gate.follow({})
            await settle()
            assert crowd.through == ["a1", "a2", "b1"]
            await crowd.is_over("b1")
            assert crowd.through[-1] == "b2"

    run(test)


def test_an_engine_that_hangs_holds_the_others_up_for_a_moment_only() -> None:
    async def test() -> None:
        a, b = line("a"), line("b")
        with closed(Gate([a, b])) as crowd:
            crowd.gate.follow(SHORT)
            await crowd.comes("a1", a)
            await crowd.comes("b1", b)
            assert crowd.through == ["a1"]
            await asyncio.sleep(MIN_HOLD_S)
            assert crowd.through == ["a1"]
            await asyncio.sleep(PATIENCE * a.estimate.seconds(2000) - MIN_HOLD_S + 0.1)
            assert crowd.through == ["a1", "b1"]

    run(test)


def test_a_model_that_sleeps_is_woken_but_not_waited_for_by_others() -> None:
    async def test() -> None:
        sleeper = Sleeper("a")
        a, b = line("a", sleeper), line("b")
        with closed(Gate([a, b])) as crowd:
            crowd.gate.follow(SHORT)
            await crowd.comes("a1", a)
            await crowd.comes("b1", b)
            assert crowd.through == ["b1"] and sleeper.calls == 1
            sleeper.becomes(State.READY)
            await settle()
            assert crowd.through == ["b1"]  # b1 is being computed
            await crowd.speaks("b1")
            assert crowd.through == ["b1", "a1"]

    run(test)


@pytest.mark.parametrize(
    ("policy", "order"),
    [(admission.fifo, ["b0", "a1", "a2", "b1"]), (admission.deadlines, ["b0", "b1", "a1", "a2"])],
)
def test_the_policy_says_who_is_next(policy: Policy, order: list[str]) -> None:
    async def test() -> None:
        a, b = line("a"), line("b")
        b.slo = SloSettings(ttft_ms=200)
        for some in (a, b):
            for tokens in (10, 1000) * 50:
                some.estimate.observe(tokens, tokens / 1e4)
        with closed(Gate([a, b], policy)) as crowd:
            crowd.gate.follow(SHORT)
            await crowd.comes("b0", b)
            for who, to, tokens in (("a1", a, 1000), ("a2", a, 1000), ("b1", b, 100)):
                await crowd.comes(who, to, tokens)
            for _ in range(3):
                await crowd.is_over(crowd.through[-1])
            assert crowd.through == order

    run(test)


def test_the_estimate_learns_only_from_prompts_that_were_alone() -> None:
    async def test() -> None:
        a = line("a")
        before = a.estimate.line()
        with closed(Gate([a])) as crowd:
            await crowd.comes("1", a)
            await crowd.comes("2", a)
            await crowd.speaks("1")
            await crowd.speaks("2")
            assert a.estimate.line() == before
            await crowd.comes("3", a)
            await crowd.speaks("3")
            assert a.estimate.line() != before

    run(test)
