"""Every example is run as a user would run it."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def test_profile_any_model_prints_the_peak_of_each_phase(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "profile-any-model.py")]
    lines = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    peaks = {name: float(rest.split()[0]) for name, _, rest in (line.partition(": ") for line in lines)}
    assert list(peaks) == ["forward", "training_step", "the whole program"]
    assert 0 < peaks["forward"] < peaks["training_step"] <= peaks["the whole program"]
