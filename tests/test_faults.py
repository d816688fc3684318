"""Faults of every kind, after which the next run must mend all or refuse: real processes, real signals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain import Chain


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chain = Chain(tmp_path_factory.mktemp("template") / "chain")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    chain.assert_correct()
    return chain.folder


@pytest.fixture
def chain(template: Path, tmp_path: Path) -> Chain:
    shutil.copytree(template, tmp_path / "chain", symlinks=True)
    return Chain(tmp_path / "chain")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _unseen(change: Callable[[Path], None], path: Path) -> None:
    stat = path.stat()
    change(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _edit(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another source")


def _all_mtimes_new(chain: Chain, seconds: int = 4_000_000_000) -> None:
    for path in chain.folder.rglob("*"):
        os.utime(path, (seconds, seconds))


def _move(chain: Chain) -> None:
    chain.folder = Path(shutil.move(chain.folder, chain.folder.with_name("moved")))


def _stopped(
    how: str, *, edited: bool = False, deleted: bool = False, put_back: bool = False
) -> Callable[[Chain], None]:
    def damage(chain: Chain) -> None:
        if edited:
            _edit(chain)
        if deleted:
            chain.path(3).unlink()
        assert chain.stop_in(3, how) != 0
        if put_back:
            (chain.folder / "source").write_bytes(b"the source")

    return damage


def _first_build_killed(chain: Chain) -> None:
    shutil.rmtree(chain.folder / "artifacts")
    chain.stop_in(3, "kill -9")


CASES: dict[str, tuple[Callable[[Chain], object], list[int]]] = {
    "touched source": (lambda chain: (chain.folder / "source").touch(), []),
    "touched artifact": (lambda chain: chain.path(3).touch(), []),
    "deleted artifact": (lambda chain: chain.path(3).unlink(), [3]),
    "flipped bit": (lambda chain: _flip(chain.path(3)), [3]),
    "flipped bit, mtime put back": (lambda chain: _unseen(_flip, chain.path(3)), [3]),
    "truncated": (lambda chain: _truncate(chain.path(3)), [3]),
    "truncated, mtime put back": (lambda chain: _unseen(_truncate, chain.path(3)), [3]),
    "flipped bit in the last artifact": (lambda chain: _flip(chain.path(6)), [6]),
    "deleted last artifact": (lambda chain: chain.path(6).unlink(), [6]),
    "first build, kill -9": (_first_build_killed, [3, 4, 5, 6]),
    "artifact deleted, kill -9": (_stopped("kill -9", deleted=True), [3]),
    "artifact deleted, Ctrl-C": (_stopped("Ctrl-C", deleted=True), [3]),
    "artifact deleted, stage killed": (_stopped("stage killed", deleted=True), [3]),
    "source edited, kill -9": (_stopped("kill -9", edited=True), [3, 4, 5, 6]),
    "source edited, stage killed": (_stopped("stage killed", edited=True), [3, 4, 5, 6]),
    "source edited, kill -9, source put back": (_stopped("kill -9", edited=True, put_back=True), [1, 2]),
    "source edited, Ctrl-C, source put back": (_stopped("Ctrl-C", edited=True, put_back=True), [1, 2]),
    "source edited, SIGTERM, source put back": (_stopped("SIGTERM", edited=True, put_back=True), [1, 2]),
    "stage 3's settings edited": (lambda chain: (chain.folder / "salt-s3").write_text("x"), [3, 4, 5, 6]),
    "all mtimes new": (_all_mtimes_new, []),
    "project moved": (_move, []),
}


@pytest.mark.parametrize("case", CASES)
def test_after_a_fault_the_next_run_rebuilds_only_what_is_damaged(chain: Chain, case: str) -> None:
    damage, expected = CASES[case]
    damage(chain)
    assert chain.numbers_that_run() == expected
    chain.assert_correct()
    assert chain.numbers_that_run() == []
    assert list(chain.folder.glob("artifacts/.*.partial")) == []


@pytest.mark.parametrize(("how", "code"), [("Ctrl-C", 130), ("SIGTERM", 143), ("stage killed", 1)])
def test_a_terminated_run_reports_the_signal(chain: Chain, how: str, code: int) -> None:
    _edit(chain)
    assert chain.stop_in(2, how) == code


def test_the_old_artifact_stays_readable_until_a_stage_ends(chain: Chain) -> None:
    before = chain.path(3).read_bytes()
    _edit(chain)
    process, _ = chain.pause_in(3)
    assert chain.path(3).read_bytes() == before
    (chain.folder / "go").write_text("")
    process.communicate()
    assert process.returncode == 0
    chain.assert_correct()


def test_an_input_edited_while_its_stage_runs_makes_it_stale_next_time(chain: Chain) -> None:
    _edit(chain)
    process, _ = chain.pause_in(1)
    (chain.folder / "source").write_bytes(b"a third source")
    (chain.folder / "go").write_text("")
    process.communicate()
    assert process.returncode == 0
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    chain.assert_correct()


@pytest.mark.parametrize("seconds", [1_000_000_000, 4_000_000_000], ids=["2001", "2096"])
def test_the_files_of_a_fresh_checkout_are_read_once(chain: Chain, seconds: int) -> None:
    _all_mtimes_new(chain, seconds)
    assert chain.numbers_that_run() == []
    digests = chain.folder / "artifacts/.mlxflow/digests.json"
    known = json.loads(digests.read_text())["files"]
    mtimes = [known[name][1] for name in known if name.startswith(str(chain.folder))]
    assert mtimes == [seconds * 10**9] * 7  # as they are now
    before = digests.stat().st_mtime_ns
    assert chain.numbers_that_run() == []
    assert digests.stat().st_mtime_ns == before


def test_unfinished_files_of_a_killed_doit_are_removed_by_the_next(chain: Chain) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    state = chain.folder / "artifacts/.mlxflow"
    (state / "unfinished/train/0123").mkdir(parents=True)
    orphans = [
        state / f".digests.json.{process.pid}.tmp",
        state / f"graph.{process.pid}.tmp",
        state / f"unfinished/train/0123/.best-000002.safetensors.{process.pid}.tmp.safetensors",
        chain.folder / f"artifacts/.index.html.{process.pid}.tmp",
        chain.folder / f".mlxflow.lock.{process.pid}.tmp",
    ]
    kept = [chain.folder / f".notes.{process.pid}.tmp", state / f".digests.json.{os.getpid()}.tmp"]
    for path in (*orphans, *kept):
        path.touch()
    assert chain.numbers_that_run() == []
    assert [path for path in (*orphans, *kept) if path.exists()] == kept
