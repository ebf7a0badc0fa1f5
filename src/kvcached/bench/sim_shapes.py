"""What a simulated GPU can do and what a model asks of it; for ``kvcached bench simulate``.

A step of an engine takes as long as its bottlenecks: it reads the weights or, with a prompt in it,
computes for longer than that; and it reads the KV cache of what it decodes. The constants are those
of an H100 on which vLLM ran an 8B model (docs/performance.md): a step of 48 short contexts took
8.1 ms, one of 200 long ones 20.9 ms, and 31,000 tokens of prompts were computed a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcached.units import GIB, KIB


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. Bandwidth in bytes, compute in floating-point operations a second."""

    memory_bytes: int = 79 * GIB
    bandwidth: float = 2.7e12
    compute: float = 500e12
    step_overhead_s: float = 0.0006
    request_overhead_s: float = 0.0
    """Of a step, for each request in it."""
    at_once: int = 1
    """Engines that take steps side by side, each as fast as alone: the cores of a CPU."""


H200 = Device(memory_bytes=139 * GIB, bandwidth=2.7e12 * 4.8 / 3.35)
"""As fast as an H100 but for its memory, by the vendor's figures for both."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One model: its parameters (16 bits each) and the KV cache of a token."""

    name: str
    parameters: float
    token_bytes: int
    page_bytes: int

    @property
    def weight_bytes(self) -> int:
        return round(2 * self.parameters)

    @property
    def fixed_bytes(self) -> int:
        """What an engine holds beside its KV cache: weights, context, graphs, activations."""
        return self.weight_bytes + round(2.3 * GIB)

    def step_s(
        self, device: Device, context_tokens: int, prompt_tokens: int, requests: int = 0
    ) -> float:
        """How long a step of so many requests takes that decodes over so much context and computes
        such prompts.
        """
        compute = 2 * self.parameters * (prompt_tokens + requests) / device.compute
        weights = self.weight_bytes / device.bandwidth
        context = context_tokens * self.token_bytes / device.bandwidth
        overhead = device.step_overhead_s + requests * device.request_overhead_s
        return overhead + max(weights, compute) + context


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1b", 1.24e9, 32 * KIB, 16 << 20),
        Shape("3b", 3.21e9, 112 * KIB, 28 << 20),
        Shape("8b", 8.03e9, 128 * KIB, 32 << 20),
    )
}
TINY = Shape("tiny", 4.46e6, 4 * KIB, 512 * KIB)
"""What benchmarks run on a CPU, in 32 bits: only for ``bench.sim_check``."""
