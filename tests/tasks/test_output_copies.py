"""A copy of an output that lies beside the folders of all artifacts, such as the page."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doit.globals import Globals

from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.archive import pack, unpack
from mlxflow.tasks.creator import remove_artifact
from mlxflow.workflow.outputs import damaged_outputs, observe_outputs
from mlxflow.workflow.stage_node import Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    folder = tmp_path / "artifacts/report"
    folder.mkdir(parents=True)
    for path in (folder / "index.html", tmp_path / "artifacts/index.html"):
        path.write_text("<p>the page")
    return Node(
        task="report",
        doc="",
        root=tmp_path,
        folder="artifacts/report",
        inputs=(),
        outputs=("artifacts/report/index.html",),
        settings={},
        command=(),
        copies={"artifacts/index.html": "artifacts/report/index.html"},
    )


def _record(node: Node) -> dict[str, Any]:
    outputs = observe_outputs(node, DigestCache(node.root / "none"))
    return {"settings": {}, "inputs": {}, "outputs": outputs, "seconds": 1.0}


def _damage(node: Node, record: dict[str, Any]) -> list[str]:
    return list(damaged_outputs(node, record, DigestCache(node.root / "none")))


def test_a_copy_is_verified_like_its_original(node: Node) -> None:
    record = _record(node)
    assert _damage(node, record) == []
    (node.root / "artifacts/index.html").write_text("<p>the Page")
    assert _damage(node, record) == ["artifacts/index.html was changed after the run"]
    (node.root / "artifacts/index.html").unlink()
    assert _damage(node, record) == ["artifacts/index.html is missing"]


def test_clean_removes_the_copy_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Globals, "dep_manager", SimpleNamespace(remove=lambda task: None))
    remove_artifact(node, dryrun=True)
    assert (node.root / "artifacts/index.html").exists()
    remove_artifact(node, dryrun=False)
    assert list((node.root / "artifacts").iterdir()) == []


def test_unpack_restores_the_copy(node: Node, tmp_path: Path) -> None:
    record = _record(node)
    pack(node, record, tmp_path / "packed.tar")
    (node.root / "artifacts/index.html").unlink()
    unpack(tmp_path / "packed.tar", {"report": node})
    assert _damage(node, record) == []


def test_a_stage_node_keeps_its_copies_in_the_cached_graph(node: Node) -> None:
    assert Node.from_json(json.loads(json.dumps(node.as_json()))) == node
