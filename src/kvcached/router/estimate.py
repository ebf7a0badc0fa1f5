"""How long a model's engine takes for a prompt, learned from the first tokens that were seen.

A straight line through (tokens of the prompt, seconds to the first token), fitted by least squares
with weights that fade: the engine's speed changes with its neighbours. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

FADING = 0.97
"""What one observation leaves of the weight of all before it: about the last hundred count."""
# Until something was seen: 20 ms and 10,000 tokens a second, with the weight of one observation.
_FIRST_GUESS = ((0.0, 0.020, 0.5), (2000.0, 0.220, 0.5))
MIN_S = 0.0005


@dataclass(slots=True)
class Estimate:
    """One model's. Not thread safe."""

    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def __post_init__(self) -> None:
        for tokens, seconds, weight in _FIRST_GUESS:
            self._add(tokens, seconds, weight)

    def observe(self, tokens: float, seconds: float) -> None:
        """A prompt of so many tokens, alone with its engine, took so long to its first token."""
        for name in ("_weight", "_x", "_y", "_xx", "_xy"):
            setattr(self, name, getattr(self, name) * FADING)
        self._add(tokens, seconds, 1.0)

    def _add(self, x: float, y: float, weight: float) -> None:
        self._weight += weight
        self._x += weight * x
        self._y += weight * y
        self._xx += weight * x * x
        self._xy += weight * x * y

    def line(self) -> tuple[float, float]:
        """Seconds for an empty prompt, and for each token; neither is below zero."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = 0.0
        if spread > 1e-9:
            slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread)
        if mean_x > 0:
            slope = min(slope, mean_y / mean_x)  # a line that starts below zero is no time
        return mean_y - slope * mean_x, slope

    def seconds(self, tokens: float) -> float:
        """How long a prompt is expected to take, in seconds."""
        start, slope = self.line()
        return max(MIN_S, start + slope * tokens)
