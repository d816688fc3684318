"""Verbs that write take turns with doit; what lies in the place of our files is neither waited for nor followed."""

import os
import shutil
from pathlib import Path

import pytest

from tests.chain import Chain


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("a", "file"):
        (folder / name).write_text("precious")
    return folder


@pytest.mark.parametrize("verb", [("unpack", "s3.tar"), ("clean", "s3"), ("pack", "s3", "again.tar")])
def test_a_verb_that_writes_waits_while_doit_builds_the_stage(chain: Chain, verb: tuple[str, ...]) -> None:
    assert chain.doit("pack", "s3", "s3.tar")[0] == 0
    packed = chain.path(3).read_bytes()
    (chain.folder / "salt-s3").write_text("other")
    building, _ = chain.pause_in(3, "s3")
    process = chain.start(*verb)
    assert process.stderr is not None
    assert process.stderr.readline() == f"another doit (process {building.pid}) is using these artifacts\n"
    assert chain.path(3).read_bytes() == packed  # as it was until doit is done
    (chain.folder / "go").write_text("")
    building.communicate()
    _, err = process.communicate()
    assert (building.returncode, process.returncode) == (0, 0), err
    left = chain.path(3).read_bytes() if chain.path(3).exists() else None
    assert left == {"unpack": packed, "clean": None, "pack": chain.expected()[3]}[verb[0]]
    reasons = chain.doit("plan", "s3")[1]
    assert ("never built" in reasons) == (verb[0] == "clean")


NO_FILE = "is no regular file, and nothing is written through it. Move it away."

#: A place, what is put there, and the last line that doit prints; nothing where it builds all the same.
PLACES = {
    ("artifacts/.mlxflow/lock", "link to a file"): f"artifacts/.mlxflow/lock: {NO_FILE}",
    ("artifacts/.mlxflow/lock", "FIFO"): f"artifacts/.mlxflow/lock: {NO_FILE}",
    ("artifacts/logs/s2.log", "link to a file"): "",
    ("artifacts/logs/s2.log", "FIFO"): "",
    ("artifacts/logs", "file"): "artifacts/logs: File exists. Move away the file or folder of this name.",
    ("artifacts/s2/a", "FIFO"): "",
    ("artifacts/s2/a", "link to a file"): "",
    ("mlxflow.lock", "FIFO"): "mlxflow.lock: is no regular file. Fix that, and run it again.",
    ("source", "FIFO"): "s1: an input is damaged (it is no regular file)",
}


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_a_path_that_blocks_an_output_is_named_in_one_line_or_replaced(
    chain: Chain, other: Path, place: str, kind: str
) -> None:
    path = chain.folder / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make = {"FIFO": os.mkfifo, "file": Path.touch, "link to a file": lambda path: path.symlink_to(other / "file")}
    make[kind](path)
    (chain.folder / "salt-s2").write_text("other")
    code, _, err = chain.doit()
    if line := PLACES[place, kind]:
        assert (code != 0, err.splitlines()[-1]) == (True, line)
    else:
        assert code == 0, err
        chain.assert_correct()
    assert "Traceback" not in err
    assert {one.name: one.read_text() for one in other.iterdir()} == {"a": "precious", "file": "precious"}


def test_clean_removes_a_link_inside_an_artifact_but_not_its_target(chain: Chain, other: Path) -> None:
    (chain.folder / "artifacts/s2/more").symlink_to(other)
    chain.path(3).unlink()
    chain.path(3).symlink_to(other / "file")
    code, _, err = chain.doit("clean")
    assert code == 0, err
    assert {one.name: one.read_text() for one in other.iterdir()} == {"a": "precious", "file": "precious"}
