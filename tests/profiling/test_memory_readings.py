import shutil
import subprocess
from pathlib import Path

import pytest

from mlxflow.profiling.memory_readings import device_memory, linux_sets


def test_linux_sets_are_read_from_smaps_rollup() -> None:
    text = "00-ff ---p [rollup]\nRss: 20 kB\nPss:  10 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 2 kB\n"
    assert linux_sets(text) == (10 * 1024, 3 * 1024)
    assert linux_sets("") == (0, 0)


_NVML = """
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) { *handle = (void*)77; return index; }
int nvmlDeviceGetMemoryInfo(void* handle, Memory* memory) {
  static unsigned long long calls = 0;
  if (handle != (void*)77 || ++calls > 2) return 999;
  memory->total = 80000000000ull, memory->free = 50000000000ull, memory->used = 30000000000ull;
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_device_memory_is_read_from_nvml(tmp_path: Path) -> None:
    (tmp_path / "nvml.c").write_text(_NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    used = device_memory(str(library))
    assert [used(), used()] == [30_000_000_000, 30_000_000_000]
    assert used() == 0  # a GPU that is lost


def test_device_memory_without_nvml_is_zero() -> None:
    assert device_memory("libno-such-library.so")() == 0
