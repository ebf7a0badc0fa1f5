from __future__ import annotations

import pytest
from devices import CudaDevice, Device, HostDevice

from kvcached.errors import UnavailableError


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Every backend passes the same suite; one that this machine has not is skipped."""
    if request.param == "host":
        return HostDevice()
    try:
        return CudaDevice()
    except UnavailableError as error:
        pytest.skip(str(error))
