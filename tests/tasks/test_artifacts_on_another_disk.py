"""doit where artifacts lie elsewhere, by links."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import Chain


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "chain")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk, where there is one."""
    memory = Path("/dev/shm")  # noqa: S108 - a disk of its own on every Linux
    made = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield made
    shutil.rmtree(made)


def test_a_stage_folder_linked_to_another_disk_is_rebuilt_there(chain: Chain, disk: Path) -> None:
    link = chain.folder / "artifacts/s3"
    link.parent.mkdir()
    link.symlink_to(disk / "s3")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    assert chain.numbers_that_run() == []
    (chain.folder / "source").write_bytes(b"another source")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    chain.assert_correct()
    assert link.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["s3"]
    chain.path(3).write_bytes(b"damaged")
    assert chain.numbers_that_run() == [3]


def test_an_interrupted_stage_leaves_nothing_on_the_other_disk(chain: Chain, disk: Path) -> None:
    link = chain.folder / "artifacts/s3"
    link.parent.mkdir()
    link.symlink_to(disk / "s3")
    assert chain.stop_in(3, "kill -9") != 0
    assert [path.name for path in disk.iterdir()] == [".s3.partial"]
    code, _, _ = chain.doit("s1")
    assert code == 0
    assert list(disk.iterdir()) == []


def test_all_artifacts_may_lie_on_another_disk(chain: Chain, disk: Path) -> None:
    (chain.folder / "artifacts").symlink_to(disk / "artifacts")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    assert chain.numbers_that_run() == []
    chain.assert_correct()
    assert (disk / "artifacts/.mlxflow/state.jsonl").exists()


def test_artifacts_on_a_disk_that_is_not_mounted_fail_in_one_line(chain: Chain, tmp_path: Path) -> None:
    (chain.folder / "artifacts").symlink_to(tmp_path / "not-mounted/artifacts")
    assert chain.doit() == (
        1,
        "",
        f"artifacts: is a link to {tmp_path}/not-mounted/artifacts, and {tmp_path}/not-mounted is not there. "
        "Mount its disk, make that folder, or remove the link.\n",
    )
    assert not (tmp_path / "not-mounted").exists()
    assert chain.doit("plan")[0] == 0


def test_cleaning_a_stage_on_another_disk_keeps_its_place(chain: Chain, disk: Path) -> None:
    link = chain.folder / "artifacts/s3"
    link.parent.mkdir()
    link.symlink_to(disk / "s3")
    assert chain.doit("s3")[0] == 0
    freed = "freed 1,000 bytes and 1 digests of removed files"
    assert chain.doit("clean", "s3") == (0, f"s3 - removing artifacts/s3\n{freed}\n", "")
    assert list(disk.iterdir()) == []
    assert chain.doit("s3")[0] == 0
    assert (disk / "s3/a").exists()


def test_a_failure_reports_the_state_of_the_artifact(chain: Chain) -> None:
    assert chain.doit()[0] == 0
    stage = chain.folder / "stage.py"
    text = stage.read_text()
    (chain.folder / "source").write_bytes(b"another source")
    stage.write_text(text + "\nraise SystemExit(name == 's2')\n")
    code, out, _ = chain.doit()
    assert (code, out.splitlines()[-1]) == (1, "!! s2: failed; its artifact was replaced before")
    stage.write_text("raise SystemExit(1)\n")
    code, out, _ = chain.doit()
    assert (code, out.splitlines()[-1]) == (1, "!! s2: failed; its artifact is unchanged")
