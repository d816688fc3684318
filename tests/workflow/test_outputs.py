"""Every file of an artifact that decides a model is recorded, verified, packed and reproduced, named or not."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.archive import pack, unpack
from mlxflow.tasks.reproduction import differing
from mlxflow.workflow.outputs import damaged_outputs, observe_outputs
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import observe_inputs, reasons

#: What a stage leaves beside what it names, and what somebody else may put there.
BESIDE = ("generation_config.json", "modeling.py", "additional_chat_templates/tool_use.jinja")
OTHERS = ("README.md", ".DS_Store", "__pycache__/modeling.cpython-311.pyc", "deeper/vocab.json")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(
        task="train",
        doc="",
        root=tmp_path,
        folder="artifacts/train",
        inputs=(),
        outputs=("artifacts/train/config.json", "artifacts/train/metrics.jsonl"),
        settings={},
        command=(),
    )
    for name in ("config.json", "metrics.jsonl", *BESIDE):
        _write(made, name)
    return made


def _write(node: Node, name: str, text: str = "{}") -> Path:
    path = node.root / node.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _record(node: Node) -> dict[str, Any]:
    cache = DigestCache(node.root / "none")
    outputs = observe_outputs(node, cache)
    return {"settings": {}, "inputs": observe_inputs(node, cache), "outputs": outputs, "seconds": 1.0}


def _damage(node: Node, record: dict[str, Any]) -> list[str]:
    return list(damaged_outputs(node, record, DigestCache(node.root / "none")))


@pytest.mark.parametrize("name", BESIDE)
def test_a_file_that_no_stage_names_is_verified(node: Node, name: str) -> None:
    record = _record(node)
    assert _damage(node, record) == []
    path = _write(node, name, "[]")
    assert _damage(node, record) == [f"artifacts/train/{name} was changed after the run"]
    path.unlink()
    assert _damage(node, record) == [f"artifacts/train/{name} is missing"]


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "model.safetensors.index.json", "model_old.safetensors", "x.py"]
)
def test_an_added_file_that_would_be_read_is_an_error(node: Node, name: str) -> None:
    record = _record(node)
    _write(node, name)
    assert _damage(node, record) == [f"artifacts/train/{name} was added after the run"]


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_no_stage_reads_are_ignored(node: Node, name: str) -> None:
    record = _record(node)
    _write(node, name)
    assert _damage(node, record) == []
    assert _record(node) == record


def test_an_archive_restores_every_file_to_its_place(node: Node) -> None:
    record = _record(node)
    pack(node, record, node.root / "packed.tar")
    with tarfile.open(node.root / "packed.tar") as archive:
        names = {name.removeprefix("artifacts/train/") for name in archive.getnames()}
    assert names == {"record.json", "config.json", "metrics.jsonl", *BESIDE}
    shutil.rmtree(node.root / node.folder)
    unpack(node.root / "packed.tar", {"train": node})
    assert _damage(node, record) == []


@pytest.mark.parametrize(
    "name",
    ["artifacts/train/../x.py", "artifacts/other/x.py", "x.py", "artifacts/train/x.sh", "artifacts/train/a/x.py"],
)
def test_an_archive_with_a_file_that_no_artifact_has_is_refused(node: Node, name: str) -> None:
    record = _record(node)
    _write(node, "x.py")
    record["outputs"][name] = record["outputs"]["artifacts/train/modeling.py"]
    path = node.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    pack(node, record, node.root / "packed.tar")
    with pytest.raises(ArtifactError) as caught:
        unpack(node.root / "packed.tar", {"train": node})
    assert str(caught.value) == (
        f"{node.root}/packed.tar: holds other files than train writes here. Pack it again with this version."
    )


def test_a_rebuilt_artifact_is_compared_file_by_file(node: Node, tmp_path: Path) -> None:
    again = Path(shutil.copytree(node.root / node.folder, tmp_path / "again"))
    assert list(differing(node, again)) == []
    (again / "generation_config.json").write_text("[]")
    (again / "modeling.py").unlink()
    (again / "vocab.json").write_text("{}")
    assert list(differing(node, again)) == [
        "artifacts/train/generation_config.json differs",
        "artifacts/train/modeling.py exists in only one of the two",
        "artifacts/train/vocab.json exists in only one of the two",
    ]


def test_files_beside_a_model_are_inputs_of_its_readers(node: Node) -> None:
    (node.root / "artifacts/quantize").mkdir()
    (node.root / "artifacts/quantize/config.json").write_text("{}")
    reader = Node(
        task="quantize",
        doc="",
        root=node.root,
        folder="artifacts/quantize",
        inputs=("artifacts/train/config.json",),
        outputs=("artifacts/quantize/config.json",),
        settings={},
        command=(),
        beside=("artifacts/train",),
    )
    assert Node.from_json(json.loads(json.dumps(reader.as_json()))) == reader
    record = _record(reader) | {"settings": {}}
    expected = ["config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja"]
    assert list(record["inputs"]) == [f"artifacts/train/{name}" for name in expected]  # no code: nothing names it
    cache = DigestCache(node.root / "none")

    def told(*leave_out: str) -> list[str]:
        return [one for one in reasons(reader, record, cache, leave_out=leave_out) if one.startswith("artifacts")]

    _write(node, "generation_config.json", "[]")
    _write(node, "vocab.json")
    (node.root / node.folder / "additional_chat_templates/tool_use.jinja").unlink()
    assert told() == [
        "artifacts/train/additional_chat_templates/tool_use.jinja is gone",
        "artifacts/train/generation_config.json changed",
        "artifacts/train/vocab.json is new",
    ]
    assert told("artifacts/train") == []
    assert told("artifacts/tra") != []
