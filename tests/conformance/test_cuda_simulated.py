"""The CUDA backend against a simulated driver: the whole suite, and what only a driver can say.

It proves the sequence of calls, their arguments and the reaction to every answer; not that a GPU
agrees. That is what the suite does where there is one (``-m gpu``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(folder: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("the simulated driver needs a C++ compiler")
    library = folder / "libcuda.so.1"
    source = str(HERE / "simulated_driver.cpp")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *options, "-o", str(library), source]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


def run(driver: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_program(driver: Path, program: str, **environment: str) -> str:
    result = run(driver, "-c", textwrap.dedent(program), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_whole_suite_passes(driver: Path) -> None:
    result = run(
        driver, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs",
        *(str(HERE / f"test_{part}.py") for part in ("arena", "faults", "mapper", "zero_holes")),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "2 skipped" in result.stdout, result.stdout  # what only the host's kernel can tell


def test_threads_current_context_is_left_as_it_was(driver: Path) -> None:
    run_program(
        driver,
        """
        import ctypes
        from kvcached import vmm_ops
        cuda = ctypes.CDLL("libcuda.so.1")
        other, current = ctypes.create_string_buffer(8), ctypes.c_void_p()
        cuda.cuCtxPushCurrent_v2(other)
        backend = vmm_ops.cuda_backend(0)
        size = backend.granularity
        arena = vmm_ops.Arena(backend, [(0, size)], 4, 4 * size)
        arena.map([0, 1])
        before = backend.free_bytes()
        assert arena.unmap([0]) == backend.free_bytes() - before
        assert arena.span(0, size).__dlpack_device__() == (2, 0)
        del arena, backend
        cuda.cuCtxGetCurrent(ctypes.byref(current))
        assert current.value == ctypes.addressof(other)
        """,
    )


def test_full_device_is_a_shortage_and_rolls_back(driver: Path) -> None:
    run_program(
        driver,
        """
        from kvcached import vmm_ops
        from kvcached.errors import OutOfMemoryError
        backend = vmm_ops.cuda_backend(0)
        size = backend.total_bytes() // 8
        arena = vmm_ops.Arena(backend, [(0, size)], 16, 16 * size)
        arena.map([0, 1, 2])
        try:
            arena.map([10, 11, 12, 13, 14, 15])
        except OutOfMemoryError as error:
            assert "page 15: creating a page on CUDA device 0: CUDA_ERROR_OUT_OF_MEMORY" in str(
                error
            ), error
        else:
            raise SystemExit("no shortage")
        assert backend.free_bytes() == 5 * size
        arena.check()
        arena.map([10, 11, 12, 13, 14])
        assert backend.free_bytes() == 0
        """,
    )


@pytest.mark.parametrize(
    ("environment", "ordinal", "message"),
    [
        ({}, 1, "no CUDA device 1: this process sees 1"),
        ({}, -1, "no CUDA device -1"),
        ({"SIMULATED_NO_VMM": "1"}, 0, "not supported by this GPU, driver or platform"),
        ({"SIMULATED_NO_DEVICE": "1"}, 0, "the CUDA driver does not start: cuInit"),
    ],
)
def test_devices_that_cannot_serve_say_why(
    driver: Path, environment: dict[str, str], ordinal: int, message: str
) -> None:
    output = run_program(driver, OPEN.format(ordinal=ordinal), **environment)
    assert message in output


def test_driver_that_is_too_old_says_what_it_lacks(tmp_path: Path) -> None:
    output = run_program(build(tmp_path, "-DSIMULATED_OLD"), OPEN.format(ordinal=0))
    assert "too old" in output
    assert "lacks cuDevicePrimaryCtxRelease_v2:" in output


def test_missing_driver_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    assert "no CUDA driver on this machine" in run_program(tmp_path, OPEN.format(ordinal=0))


OPEN = """
from kvcached import vmm_ops
from kvcached.errors import UnavailableError
for _ in range(2):
    try:
        vmm_ops.cuda_backend({ordinal})
    except UnavailableError as error:
        print(error)
    else:
        raise SystemExit("it opened")
"""
