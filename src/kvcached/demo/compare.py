"""Whether two configurations gave the same tokens, and whether a difference has an excuse.

Greedy decoding picks the largest logit. Where two logits are equal but for the last bits of a
float32 sum, another batch composition may pick the other one; nothing else may change an output.
A difference is therefore put to the plain engine: it says how far apart the two tokens are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import httpx

from kvcached.demo.load import Result, Target

TIE_LOGPROB = 1e-4
"""Log probabilities closer than this count as a tie."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which two outputs part, and the plain engine's view of it."""

    engine: str
    request: int
    position: int
    expected: int
    got: int
    logprob_gap: float | None

    @property
    def is_tie(self) -> bool:
        return self.logprob_gap is not None and abs(self.logprob_gap) <= TIE_LOGPROB


@dataclass(frozen=True, slots=True)
class Comparison:
    """All outputs of one configuration against those of the plain engines."""

    compared: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Equal token for token, ties apart."""
        return self.compared > 0 and all(difference.is_tie for difference in self.differences)

    def as_json(self) -> dict[str, object]:
        return {
            "compared": self.compared,
            "identical": self.compared - len(self.differences),
            "ties": [asdict(d) for d in self.differences if d.is_tie],
            "different": [asdict(d) for d in self.differences if not d.is_tie],
        }


def compare(
    results: Sequence[Result], plain: Sequence[Result], targets: Mapping[str, Target]
) -> Comparison:
    """Compares results with the plain engines' by request. ``targets`` are plain engines, up."""
    expected = {result.request.id: result for result in plain}
    differences = []
    for result in results:
        twin = expected[result.request.id]
        if result.ok and twin.ok and result.tokens != twin.tokens:
            differences.append(_explain(result, twin, targets[result.request.engine]))
    compared = sum(r.ok and expected[r.request.id].ok for r in results)
    return Comparison(compared, tuple(differences))


def _explain(result: Result, twin: Result, target: Target) -> Difference:
    pairs = zip(result.tokens, twin.tokens, strict=True)
    position = next(i for i, (got, wanted) in enumerate(pairs) if got != wanted)
    got, wanted = result.tokens[position], twin.tokens[position]
    prompt = [*result.request.prompt, *twin.tokens[:position]]
    gap = _logprob_gap(target, prompt, wanted, got)
    return Difference(result.request.engine, result.request.id, position, wanted, got, gap)


def _logprob_gap(target: Target, prompt: list[int], wanted: int, got: int) -> float | None:
    """How much likelier ``wanted`` is than ``got``; None when ``got`` is not among the first 5."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,
    }
    answer = httpx.post(target.url + "/v1/completions", json=body, timeout=60.0)
    answer.raise_for_status()
    top: dict[str, float] = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    first, second = top.get(f"token_id:{wanted}"), top.get(f"token_id:{got}")
    return None if first is None or second is None else first - second
