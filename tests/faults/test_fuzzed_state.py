"""State that is damaged or hostile, made by grammar: never a traceback, and what is not valid is as if it were absent.

Each test knows what a valid part of the state says; whatever is returned is that, or nothing.
"""

import json
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache, digest_file
from mlxflow.tasks import lockfile
from mlxflow.tasks.adoption import Adoption
from mlxflow.tasks.doit_backend import Journal
from mlxflow.workflow.records import check_values
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import find_stale
from tests.faults.grammar import VALUES, changed, spoilt

VALID: dict[str, Any] = {
    "settings": {"seed": 0, "version": 1, "mlx": "0.32", "config": {"layers": [{"bits": 4}], "rate": 0.5}},
    "inputs": {"source": "0" * 32},
    "outputs": {"artifacts/train/a": [4, "1" * 32]},
    "seconds": 1.5,
    "device": "cpu",
    "commit": "unknown",
}
LINE = {"task": "train", "record": {"_values_:": VALID, "deps:": [], "checker:": "InputChecker"}}
JOURNAL = (json.dumps(LINE) + "\n" + json.dumps(LINE | {"task": "other"}) + "\n").encode()


def _node(root: Path) -> Node:
    (root / "artifacts/train").mkdir(parents=True)
    (root / "artifacts/train/a").write_bytes(b"text")
    (root / "source").write_bytes(b"read")
    return Node("train", "", root, "artifacts/train", ("source",), ("artifacts/train/a",), VALID["settings"], ())


def _use(journal: Journal, node: Node, cache: DigestCache) -> None:
    """Do what doit does with a record: decide on it, write another one and read it back."""
    for task in ("train", "other"):
        record = journal.get(task, "_values_:")
        if record is not None:
            check_values(record)
    find_stale([node], lambda task: journal.get(task, "_values_:") or {}, cache)
    journal.set("train", "_values_:", VALID)
    journal.set("train", "deps:", [])
    journal.dump()
    again = Journal(journal.name, None)
    assert again.get("train", "_values_:") == VALID


def _try_journal(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()) as said:
        node = _node(Path(folder))
        path = Path(folder) / "state.jsonl"
        path.write_bytes(data)
        _use(Journal(str(path), None), node, DigestCache(Path(folder) / "digests.json"))
    assert all(line.startswith(str(path)) for line in said.getvalue().splitlines())


@given(st.one_of(spoilt(JOURNAL), changed(LINE).map(lambda line: json.dumps(line).encode() + b"\n")))
def test_a_fuzzed_journal_is_read_or_ignored(data: bytes) -> None:
    _try_journal(data)


@given(st.lists(st.one_of(VALUES, changed(LINE)), max_size=3))
def test_a_journal_of_arbitrary_lines_is_read_or_ignored(lines: list[Any]) -> None:
    _try_journal("".join(json.dumps(line) + "\n" for line in lines).encode())


def _digests(folder: Path) -> tuple[Path, bytes]:
    """Return a file of digests for a file that it knows."""
    (folder / "a").write_bytes(b"text")
    cache = DigestCache(folder / "digests.json")
    cache.digests(folder / "a")
    cache.recall("corpus", "stamp", lambda: "digest")
    cache.save()
    return folder / "digests.json", (folder / "digests.json").read_bytes()


@given(st.data())
def test_fuzzed_digests_are_correct_or_computed_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path, valid = _digests(Path(name))
        path.write_bytes(data.draw(spoilt(valid)))
        cache = DigestCache(path)
        assert cache.digests(Path(name) / "a") == digest_file(Path(name) / "a")
        assert isinstance(cache.recall("corpus", "other", lambda: "digest"), str)
        cache.save()
        assert DigestCache(path).digests(Path(name) / "a") == digest_file(Path(name) / "a")


TABLE = {
    "seed": 0,
    "stage_version": 1,
    "mlx": "0.32",
    "config": {"layers": [{"bits": 4}], "rate": 0.5},
    "seconds": 1.5,
    "measured": ["artifacts/train/b"],
    "inputs": {"source": "0" * 32},
    "outputs": {"artifacts/train/a": "1" * 32},
}
LOCK = tomli_w.dumps({"train": TABLE, "other": TABLE}).encode()

_TOML = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text("ab/.\"'\x1b\n", max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def _lock(draw: st.DrawFn) -> bytes:
    """Return a lock file of any values under the keys of a valid one."""
    keys = draw(st.lists(st.sampled_from(sorted(TABLE)), max_size=3))
    table = TABLE | {key: draw(_TOML) for key in keys}
    return tomli_w.dumps({"train": draw(st.one_of(st.just(table), _TOML)), "other": draw(_TOML)}).encode()


_MARKS = st.sampled_from([b"<<<<<<< ours\n", b"=======\n", b">>>>>>> theirs\n", b"||||||| base\n"])


@st.composite
def _merged(draw: st.DrawFn) -> bytes:
    """Return a lock file with marks of a merge between its lines."""
    lines = LOCK.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 6))):
        lines.insert(draw(st.integers(0, len(lines))), draw(_MARKS))
    return b"".join(lines)


@given(st.one_of(spoilt(LOCK), _lock(), _merged()))
def test_the_readable_part_of_a_fuzzed_lock_file_is_read(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        node = _node(root)
        path = root / layout.LOCKFILE
        path.write_bytes(data)
        adoption = Adoption([node], DigestCache(root / "digests.json"))
        record = adoption("train")
        if record is not None:
            check_values(record)
        adoption.settle_merge()
        lockfile.update(path, node, VALID, {"train", "other"})
        assert not lockfile.read(path).damage
        recorded = lockfile.recorded(lockfile.read(path).tables["train"][0]) or {}
        assert {"seconds": 1.5} | recorded == VALID | {"outputs": {"artifacts/train/a": "1" * 32}}
