"""The driver's management library, against a simulated one: calls, answers, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcached import nvml
from kvcached.errors import UnavailableError

SIMULATED = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static int started, gpu;
int nvmlInit_v2(void) { ++started; return 0; }
const char *nvmlErrorString(int result) { return result == 6 ? "Not Found" : "Uninitialized"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (!started) return 1;
  if (strcmp(uuid, "GPU-0a")) return 6;
  *handle = &gpu;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  if (index != 1) return 6;
  *handle = &gpu;
  return 0;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
  if (handle != &gpu || size < 7) return 6;
  strcpy(uuid, "GPU-0a");
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 0; return started ? 0 : 1; }
typedef struct { unsigned pid; unsigned long long used; unsigned a, b; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *found) {
  if (handle != &gpu) return 6;
  if (*count < 2) { *count = 2; return 7; }
  found[0] = (Process){12, 5ull << 30, 0, 0};
  found[1] = (Process){13, ~0ull, 0, 0};
  *count = 2;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
  if (handle != &gpu) return 6;
  /* as the driver does it: what it keeps for itself is neither free nor used */
  *memory = (Memory){143771ull << 20, 140000ull << 20, 3000ull << 20};
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("the simulated library needs a C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SIMULATED)
    target = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-o", str(target), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return target


def test_what_is_not_free_is_in_use(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", str(library))
    gpu = nvml.Gpu("GPU-0a")
    assert gpu.memory() == (3771 << 20, 143771 << 20)
    assert nvml.uuid_of(1) == "GPU-0a"


def test_refusals_are_in_the_drivers_words(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", str(library))
    with pytest.raises(UnavailableError, match=r"GPU-0b: Not Found"):
        nvml.Gpu("GPU-0b")
    with pytest.raises(UnavailableError, match=r"GPU 3: Not Found"):
        nvml.uuid_of(3)


def test_without_a_driver_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", str(tmp_path / "libnvidia-ml.so.1"))
    with pytest.raises(UnavailableError, match="libnvidia-ml"):
        nvml.Gpu("GPU-0a")


def test_processes_and_what_they_hold(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", str(library))
    assert nvml.Gpu("GPU-0a").processes() == {12: 5 << 30, 13: 0}
    assert nvml.uuids() == []


def test_which_gpu_a_process_means(monkeypatch: pytest.MonkeyPatch) -> None:
    of_bus = ["GPU-0a1", "GPU-0b2", "GPU-0b3"]
    monkeypatch.setattr(nvml, "uuids", lambda: of_bus)
    monkeypatch.setattr(nvml, "uuid_of", lambda index: of_bus[index])

    seen = nvml.visible_uuid
    assert seen(1, None) == "GPU-0b2"
    assert seen(0, "2") == "GPU-0b3"
    assert seen(1, "2, 0") == "GPU-0a1"
    assert seen(0, "GPU-0b3,GPU-0a1") == "GPU-0b3"
    assert seen(0, "GPU-0a") == "GPU-0a1"
    for visible, ordinal in (("", 0), ("1", 1), ("GPU-0b", 0), ("MIG-7", 0)):
        with pytest.raises(UnavailableError, match=f"CUDA_VISIBLE_DEVICES={visible}: no such GPU"):
            seen(ordinal, visible)
