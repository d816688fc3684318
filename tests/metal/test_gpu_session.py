import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.metal import clang

_NO_CLANG = "the stand-in for Metal needs clang 19 or newer: apt-get install clang-19"


def _pytest(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PATH": path, "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.matrix
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="more than clang is missing")
def test_without_clang_tests_are_skipped_and_those_of_a_gpu_are_an_error(tmp_path: Path) -> None:
    skipped = _pytest("tests/metal/test_capture.py", path=str(tmp_path))
    assert skipped.returncode == 0
    assert f": {_NO_CLANG}\n" in skipped.stdout
    assert skipped.stdout.splitlines()[-1].startswith("4 skipped in ")
    refused = _pytest("-m", "gpu", "--metal", "tests/kernels/test_embedding.py", path=str(tmp_path))
    assert (refused.returncode, refused.stderr.strip()) == (4, f"ERROR: {_NO_CLANG}")


@pytest.mark.usefixtures("compiler")
def test_the_tests_of_a_gpu_run_on_the_stand_in() -> None:
    assert not clang.missing()
    test = "tests/kernels/test_embedding.py::test_embedding_gradients_are_summed_for_any_width"
    done = _pytest("-m", "gpu", "--metal", test, "-k", "8 and not 2048", path=os.environ["PATH"])
    assert done.stdout.splitlines()[-1].startswith("2 passed, ")
