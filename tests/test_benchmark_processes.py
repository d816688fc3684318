"""Child processes of the benchmarks."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import let_children_import_checkout
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("paths", [None, "/elsewhere"])
def test_children_of_a_benchmark_import_this_checkout_wherever_they_run(
    paths: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # so that what the function sets is undone
    monkeypatch.delenv("PYTHONPATH")
    if paths is not None:
        monkeypatch.setenv("PYTHONPATH", paths)
    let_children_import_checkout()
    program = "import benchmarks, sys; print(benchmarks.__path__[0], '/elsewhere' in sys.path)"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(REPOSITORY / "benchmarks"), str(paths is not None)]
