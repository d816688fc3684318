"""Quantization-aware training of a 16-bit folder: a CPU computes in fp32, and the folder is written as it is stored."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import TokenFile
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.models.model_folder import load
from mlxflow.models.quantized_layers import for_evaluation
from mlxflow.training import build, run
from tests.conftest import rest_in_matrix
from tests.stages.test_quantize import Job, Variants
from tests.stages.test_quantize import job as job  # a fixture

WIDE = mx.float32 if mx.default_device() == mx.cpu else None

_QAT = {"method": "qat", "bits": 3, "group_size": 32, "num_steps": 4, "batch_size": 4}
_TABLES: dict[str, dict[str, Any]] = {
    "full": {},
    "distilled": {"distill": True},
    "lora": {"training": "lora"},
    "scales": {"training": "scales", "distill": True},
    "float codes": {"mode": "mxfp4", "bits": 4},
    "dense layers": {"layers": [{"match": "*.o_proj", "skip": True}, {"match": "*embed*", "skip": True}]},
    "float scales": {"training": "scales", "mode": "nvfp4", "bits": 4, "group_size": 16},
}


def _narrow_folder(job: Job, dtype: mx.Dtype) -> None:
    """Give the trained folder 16-bit weights."""
    file = job.folder / "artifacts/train/model.safetensors"
    weights = cast("dict[str, mx.array]", mx.load(str(file)))
    narrow = {name: value.astype(dtype) for name, value in weights.items()}
    mx.eval(narrow)
    mx.save_safetensors(str(file), narrow, {"format": "mlx"})
    config = file.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": str(dtype).rpartition(".")[2]}))


def _seen_dtypes(monkeypatch: pytest.MonkeyPatch) -> list[set[mx.Dtype]]:
    """Return a list that gets the dtypes of the layers' weights and of the logits in each training that begins."""
    seen: list[set[mx.Dtype]] = []
    plain = run.train

    def train(subject: build.Subject, *arguments: Any, **named: Any) -> Any:
        weights = [layer.fake_weight() for layer in subject.model.modules() if hasattr(layer, "fake_weight")]
        assert weights
        seen.append({one.dtype for one in [*weights, subject.model(mx.array([[1, 2, 3]]))]})
        return plain(subject, *arguments, **named)

    monkeypatch.setattr(run, "train", train)
    return seen


def _check_written(folder: Path, dtype: mx.Dtype, *, tolerance: float = 1e-6) -> None:
    """Check the dtypes of a written model, and that it is the validated one."""
    tensors = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    kinds = {value.dtype for value in tensors.values()}
    assert dtype in kinds
    assert kinds <= {mx.uint32, mx.uint8, dtype}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    rows = TokenFile.open(next(folder.parents[1].rglob("pretokenize/validation.safetensors"))).rows.head(64)
    measured = measure_perplexity(for_evaluation(load(folder)[0]), rows, batch_size=4).loss
    assert measured == pytest.approx(last["loss"], rel=tolerance)


@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", rest_in_matrix(_TABLES, "full", "scales"))
def test_a_cpu_trains_a_16_bit_folder_in_fp32_and_writes_the_stored_dtypes(
    job: Job, monkeypatch: pytest.MonkeyPatch, name: str, dtype: mx.Dtype
) -> None:
    _narrow_folder(job, dtype)
    seen = _seen_dtypes(monkeypatch)
    job.run(**_QAT | _TABLES[name], max_validation_rows=64)
    assert seen == [{WIDE or dtype}]
    # rows of an embedding without codes are in 16 bits, in which the first norm is rounded
    _check_written(job.artifact, dtype, tolerance=1e-3 if name == "dense layers" else 1e-6)


@pytest.mark.parametrize("training", rest_in_matrix(["full", "scales"], "full"))
def test_training_from_codes_of_a_16_bit_folder_is_in_fp32_on_a_cpu(
    job: Job, monkeypatch: pytest.MonkeyPatch, training: str
) -> None:
    _narrow_folder(job, mx.bfloat16)
    after = {"method": "qat", "start": "quantize:a", "training": training, "num_steps": 4, "batch_size": 4}
    tables = {"a": {"method": "block", "bits": 2, "group_size": 32, "block_steps": 2}, "b": after}
    variants = Variants(job)
    variants.run("a", **tables)
    seen = _seen_dtypes(monkeypatch)
    variants.run("b", **tables)
    assert seen == [{WIDE or mx.bfloat16}]
    _check_written(job.folder / "artifacts/quantize/b", mx.bfloat16)
    before, trained = variants.tensors("a"), variants.tensors("b")
    assert {name: value.dtype for name, value in trained.items()} == {name: one.dtype for name, one in before.items()}


def test_the_dtype_of_the_table_is_that_of_what_is_written(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    _narrow_folder(job, mx.bfloat16)
    seen = _seen_dtypes(monkeypatch)
    job.run(**_QAT, dtype="fp32", max_validation_rows=64)
    assert seen == [{mx.float32}]
    _check_written(job.artifact, mx.float32)


def test_what_is_trained_beside_the_layers_keeps_16_bits(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    _narrow_folder(job, mx.bfloat16)
    narrow: list[str] = []
    plain = run.train

    def train(subject: build.Subject, *arguments: Any, **named: Any) -> Any:
        narrow.extend(name for name, one in tree_flatten(subject.model.parameters()) if one.dtype == mx.bfloat16)
        return plain(subject, *arguments, **named)

    monkeypatch.setattr(run, "train", train)
    job.run(**_QAT)
    assert "model.norm.weight" in narrow
    assert not WIDE or not [name for name in narrow if "norm" not in name]
