"""What a file call that failed says: its file, the system's reason, and advice that fits the reason."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxflow.data.decompression import naming_errors
from mlxflow.messages.errors import MlxflowError
from mlxflow.messages.os_errors import advise_on, cause_message, is_about_a_file, naming
from mlxflow.models import adapter_files
from mlxflow.storage import config_json
from mlxflow.training import batch_size
from mlxflow.workflow import workflow_text


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "a/b: No space left on device. Make room or choose another folder."),
        (errno.EROFS, "a/b: Read-only file system. Let it be written or choose another folder."),
        (errno.EIO, "a/b: Input/output error. Look whether its disk works, and run it again."),
        (errno.EMFILE, "a/b: Too many open files. Allow this process more open files (ulimit -n)."),
        (errno.EISDIR, "a/b: Is a directory. Move away the file or folder of this name."),
        (errno.ENOENT, "a/b: No such file or directory. Put it there, or name another."),
    ],
)
def test_the_advice_fits_the_reason(number: int, line: str) -> None:
    assert cause_message(OSError(number, os.strerror(number), "a/b"), "elsewhere") == line
    assert cause_message(OSError(number, os.strerror(number)), "a/b") == line


def test_the_written_file_is_named_in_errors_of_two_files() -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO), ".a.tmp", None, "a")
    assert cause_message(error, "").startswith("a: ")


def test_a_file_is_named_only_if_the_error_names_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught, naming(tmp_path / "a"):
        os.fsync(10_000)
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as other, naming(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert other.value.filename == str(tmp_path / "b")


def test_process_and_network_errors_are_not_about_a_file() -> None:
    assert not is_about_a_file(ChildProcessError(errno.ECHILD, "No child processes"))
    assert is_about_a_file(OSError(errno.EDQUOT, "Disk quota exceeded"))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOSPC, errno.ENOLCK, errno.EINTR])
def test_advice_about_a_file_is_kept_for_reasons_that_lie_in_the_file(number: int) -> None:
    assert advise_on(OSError(number, ""), "Fix it") != "Fix it"
    for reason in (FileNotFoundError(errno.ENOENT, ""), PermissionError(errno.EACCES, ""), ValueError("no JSON")):
        assert advise_on(reason, "Fix it") == "Fix it"


def _open(path: Path) -> None:
    with naming_errors(path), path.open("rb"):
        pass


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: config_json.read(folder),
        lambda folder: adapter_files.read_config(folder),
        lambda folder: workflow_text.read(folder / "workflow.toml", "workflow.toml"),
        lambda folder: batch_size.read_decisions(folder / "metrics.jsonl", "train.replay"),
        lambda folder: _open(folder / "notes.txt"),
    ],
    ids=["config.json", "adapter_config.json", "workflow.toml", "metrics.jsonl", "source"],
)
def test_the_limit_of_open_files_is_named_in_the_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(MlxflowError):  # the file is missing; what reading it imports is imported now
        read(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(MlxflowError) as caught:
            read(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "Too many open files" in str(caught.value)
    assert str(caught.value).endswith("Allow this process more open files (ulimit -n).")
