"""A lock that code of 2026-11-29 wrote, before modules moved: what code does not change on purpose stays fresh."""

import shutil
from pathlib import Path

import pytest

from mlxflow.device.compute_device import environment
from mlxflow.storage.paths import printable
from mlxflow.tasks import lockfile
from mlxflow.tasks.graph import load_nodes
from tests.conftest import TINY

RECORDED = Path(__file__).with_name("recorded.lock")

#: Stages whose VERSION was raised since, on purpose: their artifacts of that time are stale.
RAISED = {"train": 15, "quantize:q4": 20, "quantize:q8": 20, "profile": 6, "benchmark": 8}


@pytest.mark.parametrize(
    "task", ["pretokenize", "train", "quantize:q4", "quantize:q8", "profile", "benchmark", "report"]
)
def test_artifacts_of_earlier_code_are_fresh(task: str, tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "workflow.toml")
    node = next(one for one in load_nodes(tmp_path / "workflow.toml", tmp_path / "state") if one.task == task)
    record = lockfile.recorded(lockfile.read(RECORDED).tables[task][0])
    assert record is not None
    machine = environment(node.bound_device).keys()  # it may be another one, with another MLX
    settings = {key: value for key, value in record["settings"].items() if key not in machine}
    if task in RAISED:
        assert settings["version"] < node.settings["version"] == RAISED[task]
    else:
        assert node.settings == settings
        assert {printable(name) for name in node.inputs} <= record[
            "inputs"
        ].keys()  # tokenizer files follow what is there
        assert set(node.outputs) <= record["outputs"].keys()
