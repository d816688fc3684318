import json
from pathlib import Path
from typing import Any

import pytest

from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.handover import Basis
from mlxflow.workflow.stage_node import Node

NODE = Node(
    task="quantize:q4",
    doc="makes it smaller",
    root=Path("a/b"),
    folder="artifacts/quantize/q4",
    inputs=("artifacts/train/model.safetensors",),
    outputs=("artifacts/quantize/q4/model.safetensors", "artifacts/quantize/q4/report.toml"),
    settings={"seed": 0},
    command=("python", "-m", "mlxflow"),
)


def test_from_json_returns_the_node_that_was_written() -> None:
    assert Node.from_json(json.loads(json.dumps(NODE.as_json()))) == NODE


def test_names_are_relative_to_the_workflow_and_to_the_artifact() -> None:
    assert NODE.path("artifacts/x") == "a/b/artifacts/x"
    assert NODE.output_names == ["model.safetensors", "report.toml"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": -1}, "threads of a stage is not valid"),
        ({"uses_device": 1}, "uses_device of a stage is not valid"),
        ({"inputs": "a"}, "inputs of a stage is not valid"),
        ({"more": 1}, "expected the fields of a stage"),
        ({"folder": "artifacts/train"}, "'quantize:q4' writes outside of its artifact"),
        ({"outputs": ["artifacts/quantize/q4/../x"]}, "'quantize:q4' writes outside of its artifact"),
        ({"outputs": ["artifacts/quantize/q4"]}, "'quantize:q4' writes outside of its artifact"),
        ({"copies": {"workflow.toml": "x"}}, "'quantize:q4' writes outside of its artifact"),
    ],
)
def test_from_json_refuses_invalid_fields_and_outputs_outside_the_artifact(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidStateError) as caught:
        Node.from_json(json.loads(json.dumps(NODE.as_json())) | change)
    assert str(caught.value) == reason


def test_handover_is_empty_without_a_basis() -> None:
    assert NODE.handover({}, {}) == b""
    with_basis = Node(**{**vars_of(NODE), "basis": Basis("[train]\n", [])})
    assert json.loads(with_basis.handover({"seed": 0}, None)) == [["[train]\n", []], {"seed": 0}, None]


def vars_of(node: Node) -> dict[str, Any]:
    return {name: getattr(node, name) for name in Node.__dataclass_fields__}
