import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.device import developer_tools, mlx_environment
from tests.conftest import REPOSITORY

_COMPILE = """
import sys
sys.platform = "darwin"
from mlxflow.device import developer_tools, mlx_environment
developer_tools._STAND_INS = sys.argv[1]
if {prepares}: mlx_environment.prepare()
sys.platform = "linux"
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(mx.compile(lambda x: mx.exp(x) * 2)(mx.zeros(3)).tolist())
"""


@pytest.mark.parametrize("prepares", [True, False])
def test_mlx_calls_no_stand_in_for_a_compiler(tmp_path: Path, prepares: bool) -> None:
    """MLX's Linux wheel looks for g++ as the one for macOS does."""
    for name, code in (("g++", 1), ("xcode-select", 2)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("MLX_DISABLE_COMPILE", None)
    command = [sys.executable, "-c", _COMPILE.format(prepares=prepares), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "[2.0, 2.0, 2.0]\n"
    assert (tmp_path / "calls").read_text().splitlines() == ["xcode-select -p" if prepares else "g++ --version"]


@pytest.mark.parametrize(
    ("system", "written", "expected"),
    [("darwin", None, "0"), ("darwin", "1", "1"), ("linux", None, None)],
)
def test_fp32_is_fp32_on_every_mac_unless_the_user_wants_tf32(
    system: str, written: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(developer_tools, "find", lambda program: program)
    monkeypatch.setenv("MLX_ENABLE_TF32", written or "")
    if written is None:
        monkeypatch.delenv("MLX_ENABLE_TF32")
    mlx_environment.prepare()
    assert os.environ.get("MLX_ENABLE_TF32") == expected
