import getpass
import json
import platform
import socket
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.cli import command, device_report
from mlxflow.device import compute_device
from mlxflow.kernels import registry
from mlxflow.kernels.registry import KernelSelection
from mlxflow.kernels.verifier_process import VerificationResult
from tests.conftest import REPOSITORY, mlxflow
from tests.metal import stand_in


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac whose kernels are verified but one, whose compiler's message names a file of the user."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(compute_device, "select", lambda device: "gpu")
    monkeypatch.setattr(compute_device, "name", lambda: "Apple M3 Pro")
    monkeypatch.setattr(device_report, "gpu_cores", lambda: 18)
    monkeypatch.setattr(device_report, "_PRODUCT_SIZE", 32)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)

    def choose(names: list[str]) -> KernelSelection:
        results = {name: VerificationResult(True, "", 1e-7, 0.001, 0.002) for name in names}
        results["embedding/float32"] = VerificationResult(False, f"{Path.home()}/x.metal:3: error: no type 'half'")
        return KernelSelection(results)

    monkeypatch.setattr(registry, "choose", choose)


def test_a_report_has_the_device_its_kernels_and_the_check_of_attention(mac: None) -> None:
    report = device_report.collect()
    assert report["system"] == "macOS 15.5"
    assert (report["device"], report["device_name"], report["gpu_cores"]) == ("gpu", "Apple M3 Pro", 18)
    assert report["kernels"]["adamw/float32/float32"] == {
        "passed": True, "reason": "", "error": 1e-7, "seconds": 0.001, "mlx_seconds": 0.002, "holds": True
    }  # fmt: skip
    assert report["kernels"]["embedding/float32"]["reason"] == "<path>:3: error: no type 'half'"
    assert report["attention_gradient_repeats"] == {
        f"mlx_attention{masked}/{dtype}/64": True for masked in ("", "_masked") for dtype in ("float32", "bfloat16")
    }
    assert report["matrix_product_gflops"]["bfloat16"] > 0
    assert 0 < report["working_set_bytes"] <= report["memory_bytes"]


def test_a_report_names_neither_the_user_nor_the_machine_nor_a_path(mac: None) -> None:
    text = json.dumps(device_report.collect())
    assert str(Path.home()) not in text
    assert str(REPOSITORY) not in text
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("~/own/k.metal and '/var/tmp/a b'", "<path> and '<path> b'"),
        ("its process ended with code 3", "its process ended with code 3"),
        ("rms_norm/float32/128 is 3e-4 off", "rms_norm/float32/128 is 3e-4 off"),
    ],
)
def test_paths_are_replaced_and_names_of_kernels_are_kept(text: str, shown: str) -> None:
    assert device_report.without_paths(text) == shown


def test_the_row_fits_the_table_of_the_documentation(mac: None) -> None:
    report = device_report.collect() | {"date": "2026-12-01"}
    report |= {"python": "3.12.4", "versions": {"mlx": "0.32.4"}, "memory_bytes": 36e9, "working_set_bytes": 27e9}
    report |= {"matrix_product_gflops": {"float32": 5100.4, "bfloat16": 5900}}
    assert device_report.table_row(report) == (
        "| gpu: Apple M3 Pro, 18 cores | macOS 15.5 | 3.12.4, 0.32.4 | 15 of 16 | equal to the bit | 5,100, 5,900 "
        "| 36.0, 27.0 | 2026-12-01 |"
    )
    table = (REPOSITORY / "docs/platforms.md").read_text()
    assert f"| {' | '.join(device_report.COLUMNS)} |\n|{'---|' * len(device_report.COLUMNS)}\n" in table
    differing = report | {"attention_gradient_repeats": {"a": True, "b": False}}
    assert "| differs in 1 of 2 |" in device_report.table_row(differing)


def test_every_kernel_of_the_report_is_one_that_training_asks_for() -> None:
    from mlxflow.kernels import kernel_names

    with stand_in.metal():
        names = device_report.kernels_to_verify()
    assert len(set(names)) == len(names) == 20
    assert all(kernel_names.is_known(name) for name in names)


def test_doctor_writes_the_report_and_prints_its_row(tmp_path: Path) -> None:
    result = mlxflow(tmp_path, "doctor", "--report", "report.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert result.stdout == device_report.table_row(report) + "\n"
    assert report["kernels"] == {} or report["device"] == "gpu"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none/r.json", "--report none/r.json: the folder none is missing. Make it, or name another file.\n"),
        (".", "--report .: is a folder. Name a file.\n"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device_report, "collect", lambda: pytest.fail("measured"))
    assert command.main(["doctor", "--report", name]) == 2
    assert capsys.readouterr().err == line
