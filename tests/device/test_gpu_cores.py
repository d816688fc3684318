import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.device.gpu_cores import gpu_cores

_PRINTED = """\
+-o AGXAcceleratorG13G  <class AGXAcceleratorG13G, id 0x1000004ad, registered, matched, active, busy 0 (0 ms)>
    {
      "IOClass" = "AGXAcceleratorG13G"
      "gpu-core-count" = 8
      "model" = "Apple M1"
    }
"""


@pytest.fixture(autouse=True)
def _unknown() -> Iterator[None]:
    gpu_cores.cache_clear()
    yield
    gpu_cores.cache_clear()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Act as on macOS, and return the only folder of commands."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _write_ioreg(folder: Path, printed: str) -> None:
    command = folder / "ioreg"
    command.write_text(f"#!/bin/sh\n[ \"$*\" = '-r -c AGXAccelerator -d 1' ] && echo '{printed}'\n", encoding="utf-8")
    command.chmod(0o755)


@pytest.mark.parametrize(("printed", "cores"), [(_PRINTED, 8), ("", 10), ('"gpu-core-count" = 0', 1)])
def test_a_macs_gpu_has_the_cores_that_ioreg_prints(path: Path, printed: str, cores: int) -> None:
    _write_ioreg(path, printed)
    assert gpu_cores() == cores


@pytest.mark.usefixtures("path")
def test_a_mac_without_ioreg_counts_as_the_smallest() -> None:
    assert gpu_cores() == 10


def test_other_machines_count_as_the_gpu_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert gpu_cores() == 132
