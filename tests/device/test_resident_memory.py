import subprocess
import sys

import numpy as np
import pytest

from mlxflow.device import resident_memory

_PRINT = "from mlxflow.device import resident_memory; print(resident_memory.peak_bytes())"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere a process does not count its parent's memory"
)
def test_the_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    before = resident_memory.peak_bytes()
    held = np.ones(200_000_000, np.uint8)
    assert resident_memory.peak_bytes() >= max(before, held.nbytes)
    done = subprocess.run([sys.executable, "-c", _PRINT], capture_output=True, text=True, check=True)
    assert 1_000_000 < int(done.stdout) < held.nbytes
