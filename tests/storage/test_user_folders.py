import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from mlxflow.storage import user_folders
from mlxflow.storage.user_folders import NoFolderError, cache_folder, prepare_compiled_folder, temporary_folder

OWN = f"mlxflow-{os.geteuid()}"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user whose home, cache and temporary folder lie in the test's own folder."""
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    tempfile.tempdir = None


def test_a_new_folder_can_be_entered_by_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = prepare_compiled_folder()
        cache = cache_folder()
    finally:
        os.umask(before)
    assert (folder, cache) == (tmp_path / "tmp" / OWN, tmp_path / "cache/mlxflow")
    assert [stat.S_IMODE(one.stat().st_mode) for one in (folder, cache)] == [0o700, 0o700]


def test_a_folder_readable_by_others_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "cache/mlxflow").mkdir(mode=0o755)
    assert cache_folder().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o703])
def test_a_folder_writable_by_others_is_not_used(tmp_path: Path, mode: int) -> None:
    planted = tmp_path / "tmp" / OWN
    planted.mkdir()
    planted.chmod(mode)
    assert prepare_compiled_folder() == tmp_path / "cache/mlxflow/compiled" / OWN
    assert planted.stat().st_mode & 0o777 == mode


def test_a_folder_replaceable_by_others_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "tmp").chmod(0o777)
    assert prepare_compiled_folder() == tmp_path / "cache/mlxflow/compiled" / OWN
    os.environ["TMPDIR"] = str(tmp_path / "tmp")
    (tmp_path / "tmp").chmod(0o1777)  # as /tmp is: nobody can rename what is another's
    assert prepare_compiled_folder() == tmp_path / "tmp" / OWN


def _give(path: Path, user: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, user, user, follow_symlinks=False)


def test_a_folder_or_link_of_another_user_is_not_used(tmp_path: Path) -> None:
    planted, own = tmp_path / "tmp" / OWN, tmp_path / "own"
    planted.mkdir(mode=0o777)
    _give(planted, 12345)
    assert prepare_compiled_folder() == tmp_path / "cache/mlxflow/compiled" / OWN
    planted.rmdir()
    own.mkdir()
    planted.symlink_to(own)
    _give(planted, 12345)
    os.environ["TMPDIR"] = str(tmp_path / "tmp")
    assert prepare_compiled_folder() == tmp_path / "cache/mlxflow/compiled" / OWN
    assert list(own.iterdir()) == []


def test_a_link_of_the_user_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache/mlxflow").symlink_to(tmp_path / "elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


@pytest.mark.parametrize("written", ["", "relative/cache", "."])
def test_a_cache_that_is_no_absolute_path_counts_as_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", written)
    monkeypatch.chdir(tmp_path)
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    assert cache_folder() == tmp_path / "home" / usual / "mlxflow"
    assert not (tmp_path / "relative").exists()


def test_without_a_home_the_cache_lies_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda name: name)  # as of a user without an entry in passwd
    assert cache_folder() == tmp_path / "tmp" / OWN / "cache"
    monkeypatch.setattr("os.path.expanduser", lambda name: "/dev/null/home")
    assert cache_folder() == tmp_path / "tmp" / OWN / "cache"


def test_a_missing_temporary_folder_is_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert temporary_folder() == Path("/tmp")  # noqa: S108
    prepare_compiled_folder()
    assert not (tmp_path / "nowhere").exists()


def test_the_processes_of_a_process_compile_in_the_same_folder(tmp_path: Path) -> None:
    folder = prepare_compiled_folder()
    assert os.environ["TMPDIR"] == str(folder)
    assert tempfile.gettempdir() == str(tmp_path / "tmp")
    assert prepare_compiled_folder() == folder
    script = "import tempfile; from mlxflow.storage.user_folders import prepare_compiled_folder as made; "
    script += "print(made(), tempfile.gettempdir())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(folder), str(tmp_path / "tmp")]


@pytest.mark.parametrize(
    ("free", "flags", "reason"),
    [
        (1000, 0, "1.0 kB are free and 16.8 MB needed"),
        (10**9, getattr(os, "ST_NOEXEC", 8), "is on a file system from which nothing may be run"),
    ],
)
def test_without_a_usable_folder_one_line_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, flags: int, reason: str
) -> None:
    found = os.statvfs_result((1, 1, 0, free, free, 0, 0, 0, flags, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: found)
    monkeypatch.setattr(os, "ST_NOEXEC", 8, raising=False)
    places = [tmp_path / "tmp" / OWN, tmp_path / "cache/mlxflow/compiled" / OWN]
    monkeypatch.setattr(user_folders, "_cache_places", lambda: [tmp_path / "cache/mlxflow"])
    with pytest.raises(NoFolderError) as raised:
        prepare_compiled_folder()
    assert str(raised.value) == (
        f"{places[0]} ({reason}) and {places[1]} ({reason}): no folder of your own for compiled code. "
        "Set XDG_CACHE_HOME to a folder that only you can write."
    )


KERNEL = """
from mlxflow.device import cpu_backend
cpu_backend.prepare()
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(mx.compile(lambda x: mx.exp(x) * 2)(mx.array([0.0])).item())
"""


def test_mlx_compiles_and_loads_in_that_folder_alone(tmp_path: Path) -> None:
    planted = tmp_path / "tmp/mlx" / version("mlx") / "cpu"
    planted.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True)
    assert done.stdout == "2.0\n"
    assert list(planted.iterdir()) == []
    if sys.platform == "linux" and shutil.which("g++"):
        assert list((tmp_path / "tmp" / OWN / "mlx" / version("mlx") / "cpu").glob("*.so"))
