"""The router with toy engines behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from router_runs import Running, ToyEngine, running


@pytest.fixture(scope="session")
def toys() -> Iterator[list[ToyEngine]]:
    engines = [ToyEngine() for _ in range(2)]
    yield engines
    for engine in engines:
        engine.kill()


@pytest.fixture
def engines(toys: list[ToyEngine]) -> list[ToyEngine]:
    """Two engines; what a test before has killed is started again."""
    for toy in toys:
        if toy.process.poll() is not None:
            toy.start()
    return toys


@pytest.fixture
def router(engines: list[ToyEngine]) -> Iterator[Running]:
    """With the least settings."""
    with running(engines) as started:
        yield started
