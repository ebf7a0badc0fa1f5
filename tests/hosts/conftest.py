from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import two_hosts
from toys import make_toy_python


@pytest.fixture(scope="session")
def toy_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose neighbour `vllm` is a toy."""
    return make_toy_python(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.Cluster]:
    if not two_hosts.has_ray():
        pytest.skip("there is no Ray: make test-ray brings it")
    with two_hosts.cluster(tmp_path_factory.mktemp("hosts")) as found:
        yield found
