import platform
import sys

import pytest

from mlxflow.cli import command
from mlxflow.device import supported_system

INTEL = (
    "mlxflow: this Python is for Intel processors (x86_64): expected one for Apple silicon (arm64), which MLX needs. "
    "On an Intel Mac MLX does not run; on another, install an arm64 Python."
)
OLD = "mlxflow: macOS 13.6.7: expected macOS 14 or newer, which MLX needs. Update macOS."


@pytest.mark.parametrize(
    ("system", "machine", "version", "line"),
    [
        ("darwin", "x86_64", "14.5", INTEL),  # an Intel Mac, or Python under Rosetta
        ("darwin", "arm64", "13.6.7", OLD),
        ("darwin", "arm64", "14.0", None),
        ("darwin", "arm64", "26.2", None),
        ("darwin", "arm64", "10.16", None),  # what a Python built for old systems calls every newer one
        ("linux", "x86_64", "", None),
    ],
)
def test_systems_without_mlx_get_one_line(
    system: str,
    machine: str,
    version: str,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), machine))
    assert supported_system.mistake() == line
    if line is not None:
        assert command.main(["check"]) == 2
        assert capsys.readouterr().err == line + "\n"
