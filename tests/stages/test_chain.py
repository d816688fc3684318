"""The artifacts of the whole chain, as the tools they are made for see them."""

import json
import math
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate, load
from mlx_lm.convert import convert
from mlx_lm.perplexity import eval_ppl
from safetensors import safe_open
from tokenizers import Tokenizer

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.models.quantized_layers import for_evaluation
from mlxflow.storage.report_files import read_report
from tests.conftest import mlxflow, rest_in_matrix

MODELS = ("train", "quantize/q4", "quantize/q8")


def _tensors(path: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(path)))


def _report(built: Path, stage: str) -> dict[str, Any]:
    return read_report(built / "artifacts" / stage / "report.toml")


def test_token_files_hold_the_documents_of_both_splits(built: Path) -> None:
    folder = built / "artifacts/pretokenize"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = set()
    for side in ("train", "validation"):
        opened = TokenFile.open(folder / f"{side}.safetensors")
        assert opened.rows.tokens.dtype == np.uint16
        documents = opened.documents()
        texts |= {tokenizer.decode(ids[:-1].tolist()) for ids in documents}
        assert _report(built, "pretokenize")[side]["tokens"] == sum(len(ids) for ids in documents)
        assert _report(built, "pretokenize")[side]["documents"] == len(documents)
    assert texts == {path.read_text() for path in (built / "notes").iterdir()}


def test_training_lowers_the_loss(built: Path) -> None:
    report = _report(built, "train")
    assert report["last_validation_perplexity"] < report["first_validation_perplexity"] / 3
    assert 0.9 * 20 * 4 * 16 < report["tokens"] <= 20 * 4 * 16  # the first token of a document is none to learn
    lines = [json.loads(line) for line in (built / "artifacts/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [0, 10, 20]
    assert math.log(report["last_validation_perplexity"]) == pytest.approx(lines[-1]["loss"])


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_opens_a_model_folder_and_generates(built: Path, name: str) -> None:
    model, tokenizer = load(str(built / "artifacts" / name))
    assert generate(model, tokenizer, prompt="note 3", max_tokens=5)


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_measures_the_perplexity_that_the_benchmark_reports(built: Path, name: str) -> None:
    model, _ = load(str(built / "artifacts" / name))
    rows = TokenFile.open(built / "artifacts/pretokenize/validation.safetensors").rows
    full = [i for i in range(rows.num_rows) if (rows.marks[i, 1:] == 3).all()][:40]  # of one document each
    expected, standard_error = eval_ppl(model, mx.array(rows.tokens[full].astype(np.int32)), batch_size=8)
    found = measure_perplexity(for_evaluation(model), Rows(rows.tokens[full], rows.marks[full]), batch_size=32)
    # rows of a quantized embedding are in bf16 in mlx-lm, as its scales, and in fp32 here
    assert found.perplexity == pytest.approx(expected, rel=1e-3 if name == "quantize/q4" else 1e-4)
    assert found.standard_error == pytest.approx(standard_error, rel=1e-3)
    told = next(row for row in _report(built, "benchmark")["models"] if row["model"] == name.replace("/", ":"))
    again = measure_perplexity(for_evaluation(model), rows.head(64), batch_size=32)
    assert told["perplexity"] == pytest.approx(again.perplexity, rel=1e-6)
    assert told["validation_tokens"] == again.tokens


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_quantized_tensors_equal_those_of_mlx_lm_bit_for_bit(job_copy: Path, bits: int, group_size: int) -> None:
    workflow = job_copy / "workflow.toml"
    table = f'\n[[quantize]]\nname = "kept"\ndtype = "keep"\nbits = {bits}\ngroup_size = {group_size}\n'
    workflow.write_text(workflow.read_text() + table)
    result = mlxflow(job_copy, "run", "quantize:kept")
    assert result.returncode == 0, result.stderr
    ours, theirs = job_copy / "artifacts/quantize/kept", job_copy / "q"
    convert(str(job_copy / "artifacts/train"), str(theirs), quantize=True, q_bits=bits, q_group_size=group_size)
    _assert_same_tensors(ours / "model.safetensors", theirs / "model.safetensors")
    configs = [json.loads((folder / "config.json").read_text())["quantization"] for folder in (ours, theirs)]
    assert configs[0] == configs[1]


def test_scales_under_8_bits_are_bf16_by_default(built: Path) -> None:
    folder = built / "artifacts/quantize"
    for name, dtype in (("q4", mx.bfloat16), ("q8", mx.float32)):
        tensors = _tensors(folder / name / "model.safetensors")
        narrow = {key for key, value in tensors.items() if key.endswith((".scales", ".biases"))}
        assert {tensors[key].dtype for key in narrow} == {dtype}
        others = {value.dtype for key, value in tensors.items() if key not in narrow}
        assert others == {mx.uint32, mx.float32}  # codes and norms


def test_tensors_of_a_float_mode_equal_those_of_mlx_lm(job_copy: Path, tmp_path: Path) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text() + '\n[[quantize]]\nname = "fp"\nmode = "mxfp4"\ngroup_size = 32\n')
    result = mlxflow(job_copy, "run", "quantize:fp")
    assert result.returncode == 0, result.stderr
    convert(str(job_copy / "artifacts/train"), str(tmp_path / "q"), quantize=True, q_mode="mxfp4")
    _assert_same_tensors(job_copy / "artifacts/quantize/fp/model.safetensors", tmp_path / "q/model.safetensors")


def _assert_same_tensors(ours: Path, theirs: Path) -> None:
    first, second = _tensors(ours), _tensors(theirs)
    assert first.keys() == second.keys()
    assert any(name.endswith(".scales") for name in first)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert mx.array_equal(tensor, second[name]), name


def test_training_twice_gives_the_same_bytes(built: Path, job_copy: Path) -> None:
    before = (built / "artifacts/train/model.safetensors").read_bytes()
    assert mlxflow(job_copy, "run", "train").returncode == 0
    assert (job_copy / "artifacts/train/model.safetensors").read_bytes() == before


def test_validation_changes_no_weight(job_copy: Path) -> None:
    model = job_copy / "artifacts/train/model.safetensors"
    before = _tensors(model)
    mx.eval(before)
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace("eval_every = 10", "eval_every = 3"))
    assert mlxflow(job_copy, "run", "train").returncode == 0
    assert all(mx.array_equal(tensor, before[name]) for name, tensor in _tensors(model).items())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_records_its_provenance(built: Path, name: str) -> None:
    with safe_open(built / "artifacts" / name / "model.safetensors", "numpy") as file:
        provenance = json.loads(file.metadata()["mlxflow"])
    assert provenance["stage"] == name.replace("/", ":")
    assert provenance["seed"] == "0"
    assert {"settings_digest", "inputs_digest", "mlx", "mlxflow"} < provenance.keys()


def test_sizes_and_ratios_come_from_the_files(built: Path) -> None:
    sizes = {name: (built / "artifacts" / name / "model.safetensors").stat().st_size for name in MODELS}
    for row in _report(built, "benchmark")["models"]:
        size = sizes[row["model"].replace(":", "/")]
        assert row["model_bytes"] == size
        assert row["compression_ratio"] == pytest.approx(sizes["train"] / size)
    report = _report(built, "quantize/q4")
    assert report["model_bytes"] == sizes["quantize/q4"]
    assert report["compression_ratio_fp32"] == pytest.approx(4 * report["parameters"] / sizes["quantize/q4"])
    assert report["compression_ratio_bf16"] == pytest.approx(report["compression_ratio_fp32"] / 2)
    assert sizes["quantize/q4"] < sizes["quantize/q8"] < sizes["train"]


def test_the_benchmark_times_every_batch_size(built: Path) -> None:
    rows = _report(built, "benchmark")["training"]
    assert [row["batch_size"] for row in rows if row["name"] == "baseline"] == [2, 4]
    rows = [row for row in rows if row["name"] == "workflow"]
    assert [row["batch_size"] for row in rows] == [2, 4]
    for row in rows:
        assert 0 < row["low_step_seconds"] <= row["median_step_seconds"] <= row["high_step_seconds"]
        assert row["samples_per_second"] == pytest.approx(row["batch_size"] / row["median_step_seconds"])
        share = _report(built, "pretokenize")["train"]["targets"] / _report(built, "pretokenize")["train"]["rows"]
        assert row["tokens_per_second"] == pytest.approx(row["samples_per_second"] * share)


def test_the_profile_measures_weights_moments_and_activations(built: Path) -> None:
    report = _report(built, "profile")
    timeline = _tensors(built / "artifacts/profile/timeline.safetensors")
    assert timeline["active_memory_bytes"].shape == (3,)
    assert report["active_memory_bytes"] >= 3 * report["model_bytes"]  # weights and AdamW's two moments
    assert report["peak_memory_bytes"] == timeline["peak_memory_bytes"].max().item() > report["active_memory_bytes"]
    assert report["rss_bytes"] > report["rss_before_bytes"] > 0
    assert report["median_step_seconds"] > 0


@pytest.mark.parametrize(
    "stage", rest_in_matrix(["pretokenize", "train", "quantize:q4", "quantize:q8", "report"], "train")
)
def test_only_the_run_table_differs_between_equal_runs(stage: str, built: Path, job_copy: Path) -> None:
    name = stage.replace(":", "/")
    assert mlxflow(job_copy, "run", stage).returncode == 0
    first, second = (read_report(folder / "artifacts" / name / "report.toml") for folder in (built, job_copy))
    assert first.pop("run")["seconds"] > 0
    second.pop("run")
    assert first == second
