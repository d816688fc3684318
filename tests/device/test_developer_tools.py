import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.cli import compare
from mlxflow.device import cpu_backend, developer_tools
from mlxflow.messages.errors import CallError
from mlxflow.tasks import lockfile

_MAC = """
import sys
from collections.abc import Iterator
sys.platform = "darwin"
from mlxflow.device import developer_tools
developer_tools._STAND_INS = sys.argv[1]
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make this a Mac without the command line tools: the folder of stand-ins, each of which notes its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in (("git", 1), ("g++", 1), ("xcode-select", 2)):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\nexit {code}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    monkeypatch.setattr(developer_tools, "_STAND_INS", str(folder))
    monkeypatch.setattr(sys, "platform", "darwin")
    developer_tools._are_installed.cache_clear()
    yield folder
    developer_tools._are_installed.cache_clear()


def _calls(folder: Path) -> list[str]:
    calls = folder.with_name("calls")
    return calls.read_text().splitlines() if calls.exists() else []


def test_git_is_not_called_without_the_command_line_tools(stand_ins: Path, tmp_path: Path) -> None:
    assert lockfile.source_commit(tmp_path) == "unknown"
    with pytest.raises(CallError) as caught:
        compare._git("cat-file", "blob", "HEAD:report.toml")
    assert str(caught.value) == "compare: git is not installed. Install it, or name a report or a folder."
    assert _calls(stand_ins) == ["xcode-select -p"]


def test_git_of_another_folder_is_called(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(developer_tools, "_STAND_INS", "/usr/bin")
    assert developer_tools.find("git") == str(stand_ins / "git")
    assert _calls(stand_ins) == []


def test_git_is_called_where_the_tools_are_installed(stand_ins: Path, tmp_path: Path) -> None:
    (stand_ins / "xcode-select").write_text("#!/bin/sh\necho /Library/Developer/CommandLineTools\n")
    assert developer_tools.find("git") == str(stand_ins / "git")
    lockfile.source_commit(tmp_path)
    assert [call.split()[0] for call in _calls(stand_ins)] == ["git"]


def test_a_mac_without_the_tools_gets_one_line_about_them(stand_ins: Path) -> None:
    line = "mlxflow: MLX lacks g++ (mx.compile silently runs uncompiled without it). Run: xcode-select --install"
    assert cpu_backend.notice("gpu") == cpu_backend.notice("cpu") == line
    assert _calls(stand_ins) == ["xcode-select -p"]
