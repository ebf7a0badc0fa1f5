"""What one process wrote into a GPU's memory is not there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Looks at most of the device's free memory, fills it, and waits to be killed; says whether what it
# looked at was zero.
TENANT = """
import ctypes, sys
from kvcached import vmm_ops
cuda = ctypes.CDLL("libcuda.so.1")
backend = vmm_ops.cuda_backend(0)
context, device = ctypes.c_void_p(), ctypes.c_int()
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
assert cuda.cuCtxPushCurrent_v2(context) == 0
chunk = 16 << 20
chunk -= chunk % backend.granularity
pages = int(backend.free_bytes() * 0.8) // chunk
arena = vmm_ops.Arena(backend, [(0, chunk)], pages, pages * chunk)
arena.map(list(range(pages)))
look, apart = 64 << 10, 1 << 20  # so much of every MiB
host = ctypes.create_string_buffer(look)
zeros = bytes(look)
clean = True
for page in range(pages):
    address = arena.address + page * chunk
    for offset in range(0, chunk, apart):
        place = ctypes.c_uint64(address + offset)
        assert cuda.cuMemcpyDtoH_v2(host, place, ctypes.c_size_t(look)) == 0
        clean = clean and host.raw == zeros
    whole = ctypes.c_size_t(chunk)
    assert cuda.cuMemsetD8_v2(ctypes.c_uint64(address), ctypes.c_ubyte(0xA5), whole) == 0
assert cuda.cuCtxSynchronize() == 0
print(pages * chunk >> 20, clean, flush=True)
sys.stdin.read()
"""


def test_memory_of_a_tenant_that_died_reads_as_zeros_for_the_next() -> None:
    for _ in range(3):
        tenant = subprocess.Popen(
            [sys.executable, "-c", TENANT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert tenant.stdout is not None
        said = tenant.stdout.readline().split()
        tenant.kill()
        tenant.communicate()
        assert said and int(said[0]) > 256, f"MiB looked at: {said}"
        assert said[1] == b"True"
