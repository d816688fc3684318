from pathlib import Path

import pytest

from mlxflow.messages.errors import CallError
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Settings, Workflow


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    path = tmp_path / "workflow.toml"
    path.write_text('[workflow]\nseed = 7\n[train]\n[[quantize]]\nname = "q4"\n[[quantize]]\nname = "q8"\n')
    (tmp_path / "notes.txt").write_text("text")
    return load_workflow(path)


def test_find_returns_a_variant_by_its_name_and_names_the_known_ones(workflow: Workflow) -> None:
    assert workflow.find("quantize:q8").variant == "q8"
    with pytest.raises(CallError) as caught:
        workflow.find("quantize")  # of two variants
    assert str(caught.value).startswith(f"quantize: no such stage in {workflow.path}. Known: pretokenize, train, ")


def test_a_variant_has_a_folder_and_outputs_of_its_own(workflow: Workflow) -> None:
    stage = workflow.find("quantize:q4")
    assert stage.folder == Path("artifacts/quantize/q4")
    assert {"model.safetensors", "report.toml"} <= stage.file_names
    assert all(stage.folder in path.parents for path in stage.outputs)


def test_settings_hold_the_seed_and_leave_out_execution_only_keys(workflow: Workflow) -> None:
    stage = workflow.find("train")
    settings = stage.settings()
    assert settings["seed"] == 7
    assert settings["version"] == stage.module.VERSION
    assert not set(stage.module.EXECUTION_ONLY_KEYS) & settings["config"].keys()  # type: ignore[attr-defined]
    assert stage.node(("python",)).settings == settings


def test_members_name_the_stages_that_each_reads_from(workflow: Workflow) -> None:
    reads = {member.task: member.reads for member in workflow.members()}
    assert reads["pretokenize"] == ()
    assert reads["train"] == ("pretokenize",)
    assert "train" in reads["quantize:q4"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("memory_limit", "0 GB", "expected more than 0 bytes"), ("cache_limit", "120%", "expected"), ("name", "a", "")],
)
def test_problems_of_sizes(key: str, value: str, expected: str) -> None:
    found = list(Settings(**{key: value}).problems())  # type: ignore[arg-type]
    assert [problem.key for problem in found] == ([key] if expected else [])
    assert all(problem.expected.startswith(expected) for problem in found)
