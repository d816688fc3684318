"""The lock file: what it says, what is left of it after a merge, and artifacts that are known by it alone."""

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks import lockfile
from mlxflow.tasks.adoption import Adoption
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import files_read
from tests.chain import Chain
from tests.conftest import REPOSITORY, doit

VALUES: dict[str, Any] = {
    "settings": {
        "seed": 2**63 - 1,
        "version": 3,
        "mlx": "0.32.1",
        "config": {"learning_rate": 6e-3, "weight": 1.0, "layers": [{"match": "*", "bits": 8}], "lora": {}, "on": True},
        "name": 'é "quoted"',
        "device": ["auto", "Linux", "A processor"],
    },
    "inputs": {"notes/ü.txt": "0" * 32, "builtin:python-stdlib": "1" * 32},
    "outputs": {"artifacts/train/a": [1000, "2" * 32], "artifacts/train/b": [0, "3" * 32]},
    "seconds": 12.5,
    "device": "cpu: A processor",
    "commit": "unknown",
}


def _node(task: str) -> Node:
    return Node(task, "", Path(), f"artifacts/{task}", (), (), {}, ())


def _write(path: Path, *tasks: str, **changes: Any) -> str:
    path.unlink(missing_ok=True)
    for task in tasks:
        assert lockfile.update(path, _node(task), VALUES | changes, set(tasks)) == ""
    return path.read_text()


OUTPUTS = {"artifacts/train/a": "2" * 32, "artifacts/train/b": "3" * 32}


def test_a_lock_table_holds_every_field_of_a_record_except_sizes_and_seconds(tmp_path: Path) -> None:
    _write(tmp_path / "lock", "train:a")
    (table,) = lockfile.read(tmp_path / "lock").tables["train:a"]
    assert lockfile.recorded(table) == {k: v for k, v in VALUES.items() if k != "seconds"} | {"outputs": OUTPUTS}
    assert lockfile.recorded(table | {"ranks": "2 (ring)"}) == lockfile.recorded(table) | {"ranks": "2 (ring)"}  # type: ignore[operator]
    assert lockfile.recorded(table | {"seconds": 12.5}) == VALUES | {"outputs": OUTPUTS}  # as earlier versions wrote it


def test_a_lock_table_of_a_measurement_has_only_the_names_of_its_files() -> None:
    node = replace(_node("train"), measured=("notes/ü.txt", "artifacts/train/b"))
    table = lockfile.describe(node, VALUES)
    assert table["inputs"] == {"builtin:python-stdlib": "1" * 32}
    assert table["outputs"] == {"artifacts/train/a": "2" * 32}
    assert lockfile.measured(table) == ["artifacts/train/b", "notes/ü.txt"]
    whole = replace(_node("profile"), measured=("artifacts/train/a", "artifacts/train/b"))
    assert (lockfile.recorded(lockfile.describe(whole, VALUES)) or {})["outputs"] == {}


def test_the_identity_of_a_report_leaves_out_its_table_run(tmp_path: Path) -> None:
    node = replace(_node("train"), root=tmp_path)
    report = tmp_path / "artifacts/train/report.toml"
    report.parent.mkdir(parents=True)
    values = VALUES | {"outputs": {"artifacts/train/report.toml": [1, "0" * 32]}}
    digests = set()
    for run, loss in (("seconds = 1.0", 3), ("seconds = 2.0", 3), ("seconds = 2.0", 4)):
        report.write_text(f"loss = {loss}\n[run]\n{run}\n")
        digests.add(lockfile.describe(node, values)["outputs"]["artifacts/train/report.toml"])
    assert len(digests) == 2


def test_a_lock_table_has_the_commit_of_the_first_run_with_its_result(tmp_path: Path) -> None:
    before = _write(tmp_path / "lock", "train")
    node = _node("train")
    lockfile.update(tmp_path / "lock", node, VALUES | {"commit": "f" * 40, "seconds": 99.0}, {"train"})
    assert (tmp_path / "lock").read_text() == before
    changed = VALUES | {"commit": "f" * 40, "inputs": {"notes/ü.txt": "4" * 32}}
    lockfile.update(tmp_path / "lock", node, changed, {"train"})
    (table,) = lockfile.read(tmp_path / "lock").tables["train"]
    assert (table["commit"], table["inputs"]) == ("f" * 40, {"notes/ü.txt": "4" * 32})


@pytest.mark.parametrize(
    "change",
    [{"inputs": 1}, {"outputs": {}}, {"outputs": {"a": 1}}, {"settings": "x"}, {"seconds": "long"}, {"inputs": None}],
)
def test_a_lock_table_without_a_required_part_is_no_record(tmp_path: Path, change: dict[str, Any]) -> None:
    table = lockfile.describe(_node("train"), VALUES) | change
    assert lockfile.recorded({key: value for key, value in table.items() if value is not None}) is None


def test_lock_tables_of_removed_stages_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "lock", "train", "quantize")
    lockfile.update(tmp_path / "lock", _node("quantize"), VALUES, {"quantize"})
    assert list(lockfile.read(tmp_path / "lock").tables) == ["quantize"]


def _merge(path: Path, style: str) -> None:
    """Write what git leaves of two locks that differ in two of three stages; in `both` of two lines in a row."""
    lines = []
    for line in _write(path, "pretokenize", "train:a", "quantize").splitlines(keepends=True):
        if "python" in line or "commit" in line:
            base = ["||||||| base\n", re.sub("3[.].*", '2.7"', line)] if style == "diff3" else []
            lines += [
                "<<<<<<< HEAD\n",
                line,
                *base,
                "=======\n",
                re.sub("python = .*", 'python = "99"', line),
                ">>>>>>> other branch\n",
            ]
        else:
            lines.append(line)
    path.write_text("".join(lines))


@pytest.mark.parametrize("style", ["merge", "diff3"])
def test_after_a_merge_a_stage_has_a_table_from_each_side(tmp_path: Path, style: str) -> None:
    path = tmp_path / "lock"
    whole = tomllib.loads(_write(path, "pretokenize", "train:a", "quantize"))
    _merge(path, style)
    lock = lockfile.read(path)
    assert lock.damage == "contains merge conflict markers"
    assert lock.tables == {name: [table, table | {"python": "99"}] for name, table in whole.items()}


def test_a_merge_keeps_the_side_that_matches_the_files(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    whole = tomllib.loads(_write(path, "pretokenize", "train:a", "quantize"))
    _merge(path, "merge")
    nodes = [_node("pretokenize"), _node("train:a")]
    line = lockfile.settle_merge(path, nodes, lambda node, table: node.task == "train:a" and table["python"] == "99")
    assert line == (
        f"{path}: contains merge conflict markers. For each stage the side that describes its artifact here is kept."
    )
    expected = {"pretokenize": whole["pretokenize"], "train:a": whole["train:a"] | {"python": "99"}}
    assert tomllib.loads(path.read_text()) == expected
    assert lockfile.settle_merge(path, nodes, lambda node, table: True) == ""


def test_a_merge_side_that_is_not_toml_loses_only_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    whole = tomllib.loads(_write(path, "pretokenize", "quantize", "train:a"))
    path.write_text(
        path.read_text().replace("[quantize]", "[quantize]\n<<<<<<< HEAD\nseed = \n=======\n>>>>>>> x\n", 1)
    )
    assert lockfile.read(path).tables == {name: [table] for name, table in whole.items()}  # the other side is whole
    path.write_text(path.read_text().replace("=======\n", "=======\nseed = \n"))
    del whole["quantize"]
    assert lockfile.read(path).tables == {name: [table] for name, table in whole.items()}


def test_a_damaged_lock_file_keeps_its_readable_tables_and_the_rest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    whole = tomllib.loads(_write(path, "pretokenize", "quantize", "train:a"))
    path.write_bytes(path.read_bytes().replace(b"[quantize]", b"[quantize]\nx = \xff\xfe[", 1))
    line = lockfile.update(path, _node("train:a"), VALUES, {*whole})
    assert re.fullmatch(
        rf"{path}: damaged \(.* \(at line \d+, column \d+\)\)\. The tables of pretokenize, train:a are kept; "
        r"the rest is written when its stages run\.",
        line,
    )
    assert sorted(lockfile.read(path).tables) == ["pretokenize", "train:a"]


def test_a_lock_file_without_a_readable_table_is_dropped_with_a_message(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("[s1\n")
    line = lockfile.update(path, _node("s6"), VALUES, {"s6"})
    assert line.endswith("The tables of no stage are kept; the rest is written when its stages run.")
    assert list(tomllib.loads(path.read_text())) == ["s6"]


def test_names_that_are_not_utf_8_or_hold_line_breaks_are_escaped(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.txt"), "two\nlines.txt", "x [v2].txt"]
    node = Node("s", "", tmp_path, "artifacts/s", tuple(names), (), {}, ())
    values: dict[str, Any] = {
        "settings": {"mlx": "0"},
        "seconds": 1.0,
        "inputs": {name: str(number) for number, name in enumerate(names)},
        "outputs": {},
    }
    lockfile.update(tmp_path / layout.LOCKFILE, node, values, {"s"})
    inputs = tomllib.loads((tmp_path / layout.LOCKFILE).read_text())["s"]["inputs"]
    assert inputs == {"caf\\xe9.txt": "0", "two\\nlines.txt": "1", "x [v2].txt": "2"}
    (tmp_path / "made").write_text("x")
    cache = DigestCache(tmp_path / "digests")
    values["outputs"] = {"made": [1, cache.digests(tmp_path / "made").content]}
    lockfile.update(tmp_path / layout.LOCKFILE, node, values, {"s"})
    adopted = Adoption([replace(node, outputs=("made",))], cache)("s")
    assert adopted is not None
    assert list(adopted["inputs"]) == list(files_read(node))


# --- artifacts that are known by the lock alone


@pytest.fixture
def restored(template: Path, tmp_path: Path) -> Chain:
    """Artifacts and lock, as a cache or a copy brings them, without the hidden folder."""
    shutil.copytree(template, tmp_path / "chain")
    shutil.rmtree(tmp_path / "chain/artifacts/.mlxflow")
    return Chain(tmp_path / "chain")


def _edit_lock(chain: Chain, old: str, new: str) -> None:
    path = chain.folder / "mlxflow.lock"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _digest(chain: Chain, kind: str, number: int) -> str:
    (digest,) = tomllib.loads((chain.folder / "mlxflow.lock").read_text())[f"s{number}"][kind].values()
    return str(digest)


def test_restored_artifacts_are_fresh_after_being_read_once(restored: Chain) -> None:
    assert restored.doit("plan") == (0, "nothing to do: 6 stages are fresh\n", "")
    assert restored.doit("list", "--status")[1].splitlines() == [f"U s{i}   stage {i}" for i in range(1, 7)]
    assert not (restored.folder / "artifacts/.mlxflow").exists()
    assert restored.numbers_that_run() == []
    (restored.folder / "mlxflow.lock").unlink()
    assert restored.numbers_that_run() == []  # they are known now
    digests = json.loads((restored.folder / "artifacts/.mlxflow/digests.json").read_text())["files"]
    assert len(digests) == 7


def test_restored_artifacts_pack_and_verify(restored: Chain, tmp_path: Path) -> None:
    assert restored.doit("verify")[1] == "6 files of 6 stages read, 0 damaged\n"
    assert restored.doit("pack", "s2", str(tmp_path / "s2.tar"))[0] == 0


DISAGREEMENTS: dict[str, tuple[Callable[[Chain], object], list[str]]] = {
    "another source": (
        lambda chain: (chain.folder / "source").write_bytes(b"another"),
        ["s1: source source changed", *(f"s{i}: because s{i - 1} runs" for i in range(2, 7))],
    ),
    "other settings": (
        lambda chain: (chain.folder / "salt-s5").write_text("x"),
        ['s5: s5.salt: "" -> "x"', "s6: because s5 runs"],
    ),
    "another output": (
        lambda chain: chain.path(5).write_bytes(b"x" * 1000),
        ["s5: never built", "s6: because s5 runs"],
    ),
    "an output less": (lambda chain: chain.path(6).unlink(), ["s6: never built"]),
    "another seed in the lock": (
        lambda chain: _edit_lock(chain, "seed = 0", "seed = 1"),
        ["s1: workflow.seed: 1 -> 0", *(f"s{i}: workflow.seed: 1 -> 0; because s{i - 1} runs" for i in range(2, 7))],
    ),
    "a key that the lock does not have": (
        lambda chain: _edit_lock(chain, "stage_version = 1\n", ""),
        [
            "s1: the stage's code: nothing -> 1",
            *(f"s{i}: the stage's code: nothing -> 1; because s{i - 1} runs" for i in range(2, 7)),
        ],
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_stages_that_disagree_with_the_lock_file_run(restored: Chain, case: str) -> None:
    change, expected = DISAGREEMENTS[case]
    change(restored)
    code, out, _ = restored.doit("plan")
    assert (code, [line.partition("  (")[0] for line in out.splitlines()[:-1]]) == (0, expected)
    assert restored.doit()[0] == 0
    restored.assert_correct()


def test_a_stage_whose_input_differs_from_the_lock_file_runs(restored: Chain) -> None:
    text = (restored.folder / "mlxflow.lock").read_text()
    table = text.index("[s4.inputs]")
    digest = _digest(restored, "inputs", 4)
    (restored.folder / "mlxflow.lock").write_text(text[:table] + text[table:].replace(digest, "0" * 32, 1))
    assert [line.partition("  (")[0] for line in restored.doit("plan")[1].splitlines()[:-1]] == [
        "s4: artifacts/s3/a changed",
        "s5: because s4 runs",
        "s6: because s5 runs",
    ]


def test_forgotten_stages_are_not_restored_from_the_lock_file(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "chain")
    chain = Chain(tmp_path / "chain")
    assert chain.doit("forget", "s3")[0] == 0
    assert chain.doit("plan")[1].startswith("s3: forgotten by doit forget\n")
    assert chain.numbers_that_run() == [3]
    assert chain.numbers_that_run() == []


def test_after_a_merge_the_side_that_matches_the_files_is_fresh(restored: Chain) -> None:
    path = restored.folder / "mlxflow.lock"
    ours = path.read_text()
    theirs = re.sub(r'"[0-9a-f]{32}"', f'"{0:032}"', ours)
    path.write_text(f"<<<<<<< HEAD\n{theirs}=======\n{ours}>>>>>>> other\n")
    code, out, err = restored.doit()
    assert (code, out) == (0, "".join(f"-- s{i}\n" for i in range(1, 7)))
    assert err == (
        "mlxflow.lock: contains merge conflict markers. "
        "For each stage the side that describes its artifact here is kept.\n"
    )
    assert path.read_text() == ours


def test_unpacking_writes_the_lock_too(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "chain")
    assert Chain(tmp_path / "chain").doit("pack", "s1", str(tmp_path / "s1.tar"))[0] == 0
    other = Chain(tmp_path / "other")
    assert other.doit("unpack", str(tmp_path / "s1.tar"))[0] == 0
    shutil.rmtree(other.folder / "artifacts/.mlxflow")
    assert other.doit("plan", "s1")[1] == "nothing to do: 1 stages are fresh\n"


def test_the_lock_file_has_the_digest_of_a_source_outside_of_the_project(tmp_path: Path) -> None:
    project, outside = tmp_path / "project", tmp_path / "outside.txt"
    project.mkdir()
    (project / "dodo.py").write_bytes((REPOSITORY / "dodo.py").read_bytes())
    outside.write_text("".join(f"line {number} of a text outside\n" for number in range(60)))
    table = f'sources = ["../outside.txt", "{outside}"]\ncontext_length = 16\ntokenizer = {{ vocab_size = 300 }}'
    (project / "workflow.toml").write_text(f"[pretokenize]\n{table}\nholdout = 0.5\n")
    result = doit(project)
    assert result.returncode == 0, result.stderr
    inputs = tomllib.loads((project / "mlxflow.lock").read_text())["pretokenize"]["inputs"]
    digest = xxhash.xxh3_128(outside.read_bytes()).hexdigest()
    assert inputs == {"../outside.txt": digest, str(outside): digest}
