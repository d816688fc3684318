"""What a benchmark of quantized folders reads, and what it makes the workflow build."""

from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.stages.benchmark import Config, Inputs
from mlxflow.workflow.loader import load_workflow

FOLDER = '[[quantize]]\nname = "q4"\nmodel = "model"\ngroup_size = 32\n'


def _benchmark(folder: Path, text: str) -> tuple[list[str], Config, Inputs]:
    (folder / "note.md").write_text("a note")
    (folder / "workflow.toml").write_text(text)
    workflow = load_workflow(folder / "workflow.toml")
    one = workflow.find("benchmark")
    assert isinstance(one.config, Config)
    assert isinstance(one.inputs, Inputs)
    return [stage.task for stage in workflow.stages], one.config, one.inputs


def test_a_benchmark_of_a_quantized_folder_trains_nothing(llama_folder: Path, tmp_path: Path) -> None:
    tasks, config, inputs = _benchmark(tmp_path, FOLDER + "[benchmark]\n")
    assert tasks == ["quantize:q4", "benchmark"]
    assert (config.input, config.data, config.models) == ("", "", ("quantize:*",))
    assert (inputs.model, inputs.tokens, inputs.base_name) == (None, None, "model")
    assert inputs.base == (Path("model/config.json"), Path("model/model.safetensors"))


def test_it_measures_on_the_tokens_that_there_are(llama_folder: Path, tmp_path: Path) -> None:
    tasks, config, inputs = _benchmark(tmp_path, '[pretokenize]\nsources = ["note.md"]\n' + FOLDER + "[benchmark]\n")
    assert tasks == ["pretokenize", "quantize:q4", "benchmark"]
    assert (config.input, config.data) == ("", "pretokenize")
    assert inputs.validation == Path("artifacts/pretokenize/validation.safetensors")


@pytest.mark.parametrize("table", ["[train]\nnum_steps = 3\n", "[profile]\n"])
def test_it_measures_a_training_that_is_built_anyway(llama_folder: Path, tmp_path: Path, table: str) -> None:
    tasks, config, inputs = _benchmark(tmp_path, FOLDER + table + "[benchmark]\n")
    assert "train" in tasks
    assert (config.input, config.data, config.models) == ("train", "pretokenize", ("train", "quantize:*"))
    assert inputs.base == ()


def test_alone_it_makes_the_workflow_train(tmp_path: Path) -> None:
    tasks, config, _ = _benchmark(tmp_path, "[benchmark]\n")
    assert tasks == ["pretokenize", "train", "benchmark"]
    assert config.input == "train"


def test_a_missing_folder_is_reported_once(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError) as caught:
        _benchmark(tmp_path, FOLDER + "[benchmark]\n")
    said = 'model = "model": no such folder. Name a folder with a config.json, or a hub id.'
    assert str(caught.value).endswith(said)
    assert "\n" not in str(caught.value)
