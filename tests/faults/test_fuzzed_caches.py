"""Damaged memories of the workflow and of unfinished runs: never a traceback, never a graph or a checkpoint unlike it.

Bytes are replaced, removed and put in at random; values are replaced by grammar under a checksum that fits them, as
somebody may make it who can write the folder.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxflow.data.shard_cache import ShardStore
from mlxflow.storage import state_files
from mlxflow.tasks.graph import load_nodes
from mlxflow.training.checkpoints import Checkpoint, CheckpointStore
from mlxflow.workflow.stage_node import Node
from tests.faults.grammar import changed, spoilt


@contextmanager
def _folder() -> Iterator[tuple[Path, StringIO]]:
    with tempfile.TemporaryDirectory() as name, redirect_stderr(StringIO()) as said:
        yield Path(name), said


# --- the remembered graph


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workflow whose graph is remembered."""
    folder = tmp_path_factory.mktemp("workflow")
    (folder / "notes.txt").write_text("a note")
    (folder / "workflow.toml").write_text('[pretokenize]\nsources = ["notes.txt"]\n[train]\nnum_steps = 10\n')
    (folder / "artifacts/.mlxflow").mkdir(parents=True)
    load_nodes(folder / "workflow.toml", folder / "artifacts/.mlxflow")
    return folder / "workflow.toml"


def _load(workflow: Path, graph: bytes) -> tuple[list[Node], str]:
    """Return the stages and what is printed when this is what is remembered of them."""
    state = workflow.parent / "artifacts/.mlxflow"
    (state / "graph.json").write_bytes(graph)
    with redirect_stderr(StringIO()) as said:
        nodes = load_nodes(workflow, state)
    return nodes, said.getvalue()


@pytest.fixture(scope="module")
def graph(workflow: Path) -> tuple[bytes, list[Node]]:
    """What is remembered of a workflow, and its stages."""
    state = workflow.parent / "artifacts/.mlxflow"
    return (state / "graph.json").read_bytes(), load_nodes(workflow, state)


_IGNORED = re.compile(r"\S*graph\.json: not valid state \([^\n]*\)\. The workflow is resolved again\.\n")


@given(data=st.data())
def test_a_fuzzed_graph_is_resolved_again(workflow: Path, graph: tuple[bytes, list[Node]], data: st.DataObject) -> None:
    valid, nodes = graph
    drawn = data.draw(spoilt(valid))
    found, said = _load(workflow, drawn)
    assert found == nodes
    assert drawn == valid or not said or _IGNORED.fullmatch(said)
    assert _load(workflow, (workflow.parent / "artifacts/.mlxflow/graph.json").read_bytes()) == (nodes, "")


@given(data=st.data())
def test_a_forged_graph_names_no_file_outside_the_artifacts(
    workflow: Path, graph: tuple[bytes, list[Node]], data: st.DataObject
) -> None:
    valid, nodes = graph
    stored = data.draw(changed(state_files.decode(valid)))
    found, said = _load(workflow, state_files.encode(stored))
    assert not said or _IGNORED.fullmatch(said)
    assert not said or found == nodes
    for node in found:
        assert node.command[2:5] == ("-m", "mlxflow", "run")
        assert all(name.startswith("artifacts/") and ".." not in name.split("/") for name in node.outputs)


# --- checkpoints

SETTINGS = {"seed": 0, "config.rate": 0.5}


def _arrays(step: int) -> dict[str, mx.array]:
    return {"w": mx.arange(8) + step, "b": mx.full((3,), step / 2)}


def _store(folder: Path, said: list[str]) -> CheckpointStore:
    return CheckpointStore(folder / "0123456789ab", keep=2, settings=SETTINGS, say=said.append)


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, bytes]:
    """The files of a run's two checkpoints, by name."""
    with _folder() as (folder, _):
        store = _store(folder, [])
        for step in (1, 2):
            store.save(f"{step:06}", _arrays(step), {"step": step, "loss": 1.5}, f'{{"step": {step}}}\n')
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _latest(files: dict[str, bytes]) -> tuple[Checkpoint | None, list[str]]:
    with _folder() as (folder, _):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        said: list[str] = []
        return _store(folder, said).latest(), said


def _assert_is_of(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    assert {name: array.tolist() for name, array in found.arrays.items()} == {
        name: array.tolist() for name, array in _arrays(step).items()
    }
    assert found.metrics == f'{{"step": {step}}}\n'


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "metrics.jsonl"])
@given(data=st.data())
def test_a_fuzzed_checkpoint_is_named_and_the_one_before_is_used(
    checkpoints: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    key = f"0123456789ab/step-000002/{name}"
    drawn = data.draw(spoilt(checkpoints[key]))
    found, said = _latest(checkpoints | {key: drawn})
    is_whole = drawn == checkpoints[key]
    _assert_is_of(found, 2 if is_whole else 1)
    assert found is not None
    assert found.facts == {"step": 2 if is_whole else 1, "loss": 1.5}
    assert len(said) == (0 if is_whole else 1)
    assert is_whole or re.fullmatch(
        r"\S+step-000002: not a whole checkpoint \(.*\); it is not used\. Remove it\.", said[0]
    )


@given(data=st.data())
def test_a_checkpoint_with_changed_facts_is_equivalent_or_not_used(
    checkpoints: dict[str, bytes], data: st.DataObject
) -> None:
    """What the facts mean is checked by the run that goes on from them; `mlxflow.training.restoring`."""
    key = "0123456789ab/step-000002/state.json"
    stored = data.draw(changed(state_files.decode(checkpoints[key])))
    found, said = _latest(checkpoints | {key: state_files.encode(stored)})
    _assert_is_of(found, 1 if said else 2)
    if not said:  # digests of files that a checkpoint does not have may stand there
        kept = state_files.decode(checkpoints[key])
        assert stored["settings"] == kept["settings"]
        assert stored["files"] | kept["files"] == stored["files"]


# --- what is remembered of shards

KEY = "0" * 32


@pytest.fixture(scope="module")
def shards() -> dict[str, bytes]:
    """The files of a store with one shard, by name."""
    with _folder() as (folder, _):
        store = ShardStore(folder / "shards")
        with store.write(KEY, np.dtype(np.uint8)) as writer:
            writer.append(tokens=np.arange(9, dtype=np.uint8))
        store.collect("pretokenize", [KEY], ["pretokenize"])
        return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


@given(data=st.data())
def test_fuzzed_shard_notes_are_read_or_ignored(shards: dict[str, bytes], data: st.DataObject) -> None:
    valid = json.loads(shards["notes.json"])
    drawn = st.one_of(spoilt(shards["notes.json"]), changed(valid).map(lambda value: json.dumps(value).encode()))
    with _folder() as (folder, said):
        for name, content in (shards | {"notes.json": data.draw(drawn)}).items():
            (folder / name).write_bytes(content)
        store = ShardStore(folder)
        shard = store.find(KEY)
        assert shard is not None
        assert shard.read("tokens").tolist() == list(range(9))
        store.collect("pretokenize", [KEY], ["pretokenize"])
        assert store.find(KEY) is not None
        _assert_known(folder)
    assert re.fullmatch(r"(\S*notes\.json: not valid state \([^\n]*\)\. Shards are read again\.\n)?", said.getvalue())


def _assert_known(folder: Path) -> None:
    notes: dict[str, Any] = json.loads((folder / "notes.json").read_bytes())
    assert notes["tasks"]["pretokenize"] == [KEY]
