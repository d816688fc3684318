"""Stages that read and write model folders of others: their artifacts describe the weights that are in them."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.convert import convert

from benchmarks.architecture_configs import config_of
from mlxflow.models import model_folder, quantized_layers, tokenizer_files
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import rest_in_matrix
from tests.models.test_model_folder import FP8, VISION, WRAPPERS, as_fp8, weights_of, write_folder

HEAD = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
"""
TRAIN = """
[train]
num_steps = 2
batch_size = 2
warmup_steps = 0
learning_rate = 1e-3
eval_every = 0
max_validation_rows = 4
model.from = "given"
"""


def _gemma3() -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return a model of images and text, with weights that see images."""
    table, dropped = WRAPPERS["gemma3"]
    config = {"model_type": "gemma3", "torch_dtype": "float32", **json.loads(json.dumps(table)), "vocab_size": 300}
    return config | {"vision_config": VISION}, weights_of(config) | {name: mx.ones((4, 4)) for name in dropped}


def _deepseek() -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return a model whose matrices are in fp8."""
    config = config_of("deepseek_v3") | {"torch_dtype": "bfloat16", "vocab_size": 300}
    return config | {"quantization_config": FP8}, as_fp8(weights_of(config))


FOLDERS = {"gemma3": _gemma3, "fp8 deepseek_v3": _deepseek}


@pytest.fixture(params=FOLDERS)
def job(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    """A folder with tokens and one of those models."""
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(built / "artifacts/pretokenize", tmp_path / "artifacts/pretokenize")
    shutil.copytree(built / "notes", tmp_path / "notes")
    write_folder(tmp_path / "given", *FOLDERS[request.param]())
    for name in tokenizer_files.TOKENIZER_FILES:
        shutil.copy(built / "artifacts/pretokenize" / name, tmp_path / "given")
    return tmp_path


def _run(job: Path, stage: str, text: str) -> Path:
    (job / "workflow.toml").write_text(HEAD + text)
    workflow = load_workflow(job / "workflow.toml")
    execute_stage(workflow, workflow.find(stage))
    return job / "artifacts" / stage


def _config(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "config.json").read_text()))


def _weights(folder: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))


def test_quantizing_writes_what_mlx_lms_converter_writes(job: Path) -> None:
    made = _run(job, "quantize", '[quantize]\nmodel = "given"\ndata = ""\ngroup_size = 32\ndtype = "keep"\n')
    convert(str(job / "given"), str(job / "theirs"), quantize=True, q_bits=4, q_group_size=32)
    ours, theirs = _weights(made), _weights(job / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert mx.array_equal(value, theirs[name]), name
    config, wanted = _config(made), _config(job / "theirs")
    assert {key: value for key, value in config.items() if "quantization" not in key} == {
        key: value for key, value in wanted.items() if "quantization" not in key
    }
    assert config["quantization"] == config["quantization_config"]
    assert "vision_config" not in config
    model_folder.load(made)


@pytest.mark.parametrize("method", rest_in_matrix(["full", "lora"], "lora"))
def test_training_writes_a_config_that_matches_the_weights(job: Path, method: str) -> None:
    made = _run(job, "train", TRAIN + f'method = "{method}"\n')
    config = _config(made)
    assert not {"vision_config", "quantization", "quantization_config"} & set(config)
    model, _ = model_folder.load(made)
    assert not quantized_layers.is_quantized(model)
    assert {str(value.dtype) for name, value in _weights(made).items() if "bias" not in name} == {"mlx.core.float32"}
