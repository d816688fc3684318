import sys
from pathlib import Path

import pytest

from mlxflow.cli import doctor
from mlxflow.kernels import codegen, fingerprint, registry
from mlxflow.kernels.verifier_process import Verifier
from tests.conftest import mlxflow
from tests.kernels.test_registry import _GOOD, _prover


def test_doctor_prints_the_device_and_the_versions(tmp_path: Path) -> None:
    result = mlxflow(tmp_path, "doctor")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    for expected in ("device ", "GFLOP/s", "BLAS ", "mlx-lm ", f"Python {sys.version.split()[0]}"):
        assert expected in words


def test_doctor_shows_the_verification_results_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor._describe_kernels() == "none on this device"
    monkeypatch.setattr(codegen, "language", lambda: "metal")
    assert doctor._describe_kernels() == "not verified yet; the first training run does it"
    body = "NAME == 'b' and sys.exit(3); " + _GOOD
    registry.verify_all(["a", "b"], fingerprint.environment(), Verifier(_prover(body), None, 20))
    assert doctor._describe_kernels() == "a: used\nb: its process ended with code 3"
