"""The stage `quantize` on the tiny model that the session has trained."""

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

from mlxflow.cli.check import check_plans
from mlxflow.data.token_file import TokenFile
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import ArtifactError, StageError, UserError, WorkflowError
from mlxflow.models import model_folder
from mlxflow.models.model_folder import load
from mlxflow.models.quantized_layers import dense_weights, for_evaluation
from mlxflow.quantization import calibrated
from mlxflow.quantization import job as quantization_job
from mlxflow.quantization.aware_training import suited
from mlxflow.quantization.table_requests import written_settings
from mlxflow.stages.quantize import Config
from mlxflow.storage.report_files import read_report
from mlxflow.storage.toml_tables import toml_value
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import TINY, mlxflow, rest_in_matrix
from tests.independent import LOSS_TOLERANCE, open_with_mlx_lm, validation_loss


class Job:
    """A folder in which the built models lie, and one quantize stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifact = folder / "artifacts/quantize"

    def write(self, **table: Any) -> None:
        """Write the workflow with a `[quantize]` table."""
        head = (
            TINY.read_text().partition("[[quantize]]")[0].replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]')
        )
        lines = [f"{key} = {toml_value(value)}" for key, value in table.items()]
        (self.folder / "workflow.toml").write_text("\n".join([head, "[quantize]", *lines]) + "\n")

    def run(self, **table: Any) -> dict[str, Any]:
        """Run the stage in this process and return its report."""
        self.write(**table)
        workflow = load_workflow(self.folder / "workflow.toml")
        execute_stage(workflow, workflow.find("quantize"))
        return read_report(self.artifact / "report.toml")

    def tensors(self) -> dict[str, mx.array]:
        """Return what was written."""
        return cast("dict[str, mx.array]", mx.load(str(self.artifact / "model.safetensors")))

    def problems(self, kind: type[Exception], **table: Any) -> list[str]:
        """Return the lines that the stage ends with."""
        with pytest.raises(kind) as caught:
            self.run(**table)
        return str(caught.value).splitlines()


@pytest.fixture
def job(built: Path, tmp_path: Path) -> Job:
    (tmp_path / "artifacts").mkdir()
    for name in ("pretokenize", "train"):
        shutil.copytree(built / "artifacts" / name, tmp_path / "artifacts" / name)
    shutil.copytree(built / "notes", tmp_path / "notes")
    return Job(tmp_path)


def test_layer_rules_match_mlx_lm_with_the_same_predicate(job: Job, tmp_path: Path) -> None:
    def predicate(path: str, _: Any) -> bool | dict[str, Any]:
        if path.endswith("embed_tokens"):
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        if path.endswith("o_proj"):
            return False
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"} if ".1.mlp." in path else True

    layers = [
        {"match": "*embed_tokens", "bits": 8, "group_size": 32},
        {"match": "*.o_proj", "skip": True},
        {"match": "*.1.mlp.*", "mode": "mxfp4"},
    ]
    report = job.run(bits=3, layers=layers, dtype="keep")
    convert(
        str(job.folder / "artifacts/train"), str(tmp_path / "q"), quantize=True, q_bits=3, q_group_size=64,
        quant_predicate=predicate,
    )  # fmt: skip
    ours, theirs = job.tensors(), cast("dict[str, mx.array]", mx.load(str(tmp_path / "q/model.safetensors")))
    assert ours.keys() == theirs.keys()
    assert all(
        mx.array_equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items()
    )
    load_model(job.artifact, strict=True)
    rows = {row["path"]: row for row in report["layers"]}
    assert rows["model.embed_tokens"]["bits"] == 8
    assert rows["model.layers.0.self_attn.o_proj"]["bits"] == 0
    assert rows["model.layers.1.mlp.up_proj"]["mode"] == "mxfp4"
    assert report["dense_layers"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    for path, row in rows.items():
        names = [name for name in ours if name.rpartition(".")[0] == path]
        assert row["bytes"] == sum(ours[name].nbytes for name in names)


def test_symmetric_codes_have_a_fixed_zero_point_in_the_stored_bytes(job: Job) -> None:
    report = job.run(mode="symmetric", bits=3, group_size=32)
    tensors = job.tensors()
    scales = {name: value for name, value in tensors.items() if name.endswith(".scales")}
    assert len(scales) == len(report["quantized_layers"]) > 0
    for name, value in scales.items():
        assert mx.array_equal(tensors[name.replace(".scales", ".biases")], -4 * value)
    model, config = load_model(job.artifact, strict=True)
    assert config["quantization"]["mode"] == "affine"
    dense, _ = load(job.folder / "artifacts/train")
    exact = {path: weight() for path, weight in dense_weights(dense, report["quantized_layers"]).items()}
    for path, weight in dense_weights(model, report["quantized_layers"]).items():
        lost = float(mx.linalg.norm(weight() - exact[path]) / mx.linalg.norm(exact[path]))
        row = next(row for row in report["layers"] if row["path"] == path)
        assert lost == pytest.approx(row["relative_error"], rel=1e-3)


@pytest.mark.parametrize(
    "table",
    [
        pytest.param({"bits": 2}, marks=pytest.mark.matrix),
        {"bits": 3, "mode": "symmetric", "dtype": "bf16", "distill": True},
        pytest.param(
            {"mode": "mxfp4", "group_size": 32, "layers": [{"match": "*embed*", "mode": "affine", "bits": 8}]},
            marks=pytest.mark.matrix,
        ),
        pytest.param({"bits": 4, "training": "lora", "checkpointing": "layers"}, marks=pytest.mark.matrix),
    ],
)
def test_the_validated_qat_model_is_the_written_model(job: Job, table: dict[str, Any]) -> None:
    report = job.run(method="qat", num_steps=4, batch_size=4, max_validation_rows=64, **table)
    lines = [json.loads(line) for line in (job.artifact / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    rows = TokenFile.open(job.folder / "artifacts/pretokenize/validation.safetensors").rows.head(64)
    model = for_evaluation(load(job.artifact)[0])  # of 16 bits, in fp32 on a CPU, as it was trained
    assert measure_perplexity(model, rows, batch_size=4).loss == pytest.approx(last["loss"], rel=1e-6)
    # and training moved the weights: rounding the dense model gives other codes
    trained = job.tensors()
    rounded = {key: value for key, value in table.items() if key not in ("distill", "training", "checkpointing")}
    assert report["training"]["steps"] == 4
    job.run(**rounded)
    plain = job.tensors()
    assert trained.keys() == plain.keys()
    assert any(not mx.array_equal(trained[name], value) for name, value in plain.items())


def _stop_training(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Let every training save a checkpoint after a step, and end."""
    from mlxflow.training import trainer

    update = trainer.Trainer._after_update

    def stopped(self: Any) -> None:
        if self._facts.step == step:
            raise trainer.Stopped(step, self._save())
        update(self)

    monkeypatch.setattr(trainer.Trainer, "_after_update", stopped)


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_interrupted_qat_resumes_to_the_same_bytes(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    table = {"method": "qat", "mode": "symmetric", "bits": 3, "num_steps": 6, "batch_size": 4, "dtype": dtype}
    job.run(**table)
    whole = (job.artifact / "model.safetensors").read_bytes()
    shutil.rmtree(job.artifact)
    _stop_training(monkeypatch, step=3)
    with pytest.raises(SystemExit):
        job.run(**table)
    assert not job.artifact.exists()
    monkeypatch.undo()
    assert "steps are done" not in capsys.readouterr().err
    job.run(**table)
    assert "; 3 of 6 steps are done, which is not counted\n" in capsys.readouterr().err
    assert (job.artifact / "model.safetensors").read_bytes() == whole


_BRIEF = {"bits": 3, "calibration_rows": 16}
_TAKES = "quantize: takes the layers that an interrupted run learned ("


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {"method": "qat", "bits": 3, "num_steps": 4, "batch_size": 4, "training": "lora"},
            "quantize: resumes from step 4 (",
        ),
        ({"method": "dwq", **_BRIEF}, _TAKES),
        ({"method": "block", "block_steps": 2, "scale_steps": 2, **_BRIEF}, _TAKES),
    ],
    ids=["qat", "dwq", "scale_steps"],
)
def test_what_was_trained_is_not_lost_if_the_writing_of_the_model_is_interrupted(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: dict[str, Any],
    line: str,
) -> None:
    first = job.run(**table)
    whole = (job.artifact / "model.safetensors").read_bytes()
    shutil.rmtree(job.artifact)

    def interrupted(*arguments: Any, **named: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(quantization_job, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.run(**table)
    assert line not in capsys.readouterr().err
    monkeypatch.undo()
    second = job.run(**table)
    assert line in capsys.readouterr().err
    assert (job.artifact / "model.safetensors").read_bytes() == whole
    assert second.get("scale_steps") == first.get("scale_steps")


_KILLED = """
import os, signal
from mlxflow.device import cpu_backend
cpu_backend.prepare()  # before MLX is imported
from mlxflow.quantization import learned_codes, tuning_saves
kind, name, count = {kind}, "{name}", {count}
plain, calls = getattr(kind, name), 0
def killing(self, *arguments):
    global calls
    result = plain(self, *arguments)
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(kind, name, killing)
tuning_saves._SECONDS = tuning_saves._DURATIONS = 0.0
from mlxflow.__main__ import main
import sys
sys.argv = ["mlxflow", "run", "quantize"]
raise SystemExit(main())
"""
_AT_STEP, _AT_BLOCK = ("tuning_saves.TuningSaves", "note", 2), ("learned_codes.BlockStore", "keep", 1)
_TRAINED: dict[str, Any] = {"bits": 3, "calibration_rows": 20}


@pytest.mark.parametrize(
    ("table", "where", "line"),
    [
        ({"method": "dwq", **_TRAINED}, _AT_STEP, "quantize: resumes from step 2 of 4 of the tuning\n"),
        (
            {"method": "block", "block_steps": 1, "scale_steps": 4, **_TRAINED},
            _AT_STEP,
            "quantize: resumes from step 2 of 4 of the tuning\n",
        ),
        ({"method": "gptq", **_TRAINED, "bits": 2}, _AT_BLOCK, "; 1 of 2 blocks are done, which is not counted\n"),
        ({"method": "awq", **_TRAINED}, _AT_BLOCK, "; 1 of 2 blocks are done, which is not counted\n"),
    ],
    ids=["dwq", "scale_steps", "gptq", "awq"],
)
def test_a_killed_run_goes_on_after_what_was_saved_to_the_same_bytes(
    job: Job, table: dict[str, Any], where: tuple[str, str, int], line: str
) -> None:
    job.write(**table)

    def run() -> tuple[str, bytes, dict[str, Any]]:
        done = mlxflow(job.folder, "run", "quantize")
        assert done.returncode == 0, done.stderr
        report = read_report(job.artifact / "report.toml")
        return done.stderr, (job.artifact / "model.safetensors").read_bytes(), report

    said, whole, first = run()
    assert line not in said
    shutil.rmtree(job.artifact)
    code = _KILLED.format(**dict(zip(("kind", "name", "count"), where, strict=True)))
    killed = subprocess.run([sys.executable, "-c", code], cwd=job.folder, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not job.artifact.exists()
    said, resumed, second = run()
    assert line in said
    assert resumed == whole
    assert second.get("scale_steps") == first.get("scale_steps")
    assert second["quality"] == first["quality"]


def test_a_tuning_of_other_settings_is_not_used(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    code = _KILLED.format(**dict(zip(("kind", "name", "count"), _AT_STEP, strict=True)))
    job.write(**({"method": "dwq"} | _TRAINED))
    subprocess.run([sys.executable, "-c", code], cwd=job.folder, check=False, capture_output=True)
    assert list((job.folder / "artifacts").rglob("tuning/state.json"))
    others: list[dict[str, Any]] = [
        {"bits": 2},
        {"layers": [{"match": "*embed*", "bits": 8}]},
        {"calibration_rows": 24},
    ]
    for changed in others:
        job.run(**({"method": "dwq"} | _TRAINED | changed))
        assert "of the tuning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "rate"),
    [({}, 8e-4 * 0.12**0.5), ({"num_steps": 300}, 8e-4), ({"num_steps": 9000}, 8e-4), ({"num_epochs": 150}, 8e-4)],
)
def test_qat_of_few_steps_uses_a_lower_learning_rate(table: dict[str, Any], rate: float) -> None:
    written, model = written_settings(Config(method="qat", **table), 64), nn.Linear(4, 4)
    suit = functools.partial(suited, written, model, trains_grids=False)
    assert suit(learning_rate="auto", rate_share=1.0).learning_rate == pytest.approx(rate)
    assert suit(learning_rate="auto", rate_share=0.125).learning_rate == pytest.approx(rate / 8)
    assert suit(learning_rate=0.1, rate_share=0.125).learning_rate == 0.1


@pytest.mark.parametrize(
    ("table", "rate"),
    [
        ({"training": "scales", "distill": True, "bits": 4}, 5e-4),
        ({"training": "scales", "distill": True, "bits": 3}, 2e-3),
        ({"training": "scales", "bits": 4}, 2e-3),
        ({"training": "scales", "distill": True, "bits": 8}, 2.5e-4),
        ({"training": "scales", "distill": True, "mode": "nvfp4"}, 2e-3),
    ],
)
def test_scales_of_4_bits_are_distilled_at_a_lower_rate(job: Job, table: dict[str, Any], rate: float) -> None:
    group_size = 16 if "mode" in table else 32
    job.run(method="qat", num_steps=2, batch_size=4, group_size=group_size, **table)
    lines = [json.loads(line) for line in (job.artifact / "metrics.jsonl").read_text().splitlines()]
    assert max(line["learning_rate"] for line in lines if line["kind"] == "train") == pytest.approx(rate)


def test_an_infinite_qat_loss_names_the_key_of_quantize(job: Job) -> None:
    path = job.folder / "artifacts/train/model.safetensors"
    tensors = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(tensors)
    tensors["model.norm.weight"][0] = float("inf")
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    (line,) = job.problems(StageError, method="qat", num_steps=20, batch_size=2)
    assert line.startswith("quantize: 10 steps in a row had no finite loss and gradient")
    assert line.endswith(" Lower quantize.learning_rate.")
    assert not job.artifact.exists()


def test_out_of_memory_in_qat_names_the_keys_of_quantize(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 5000 bytes.")

    monkeypatch.setattr("mlxflow.training.step.Step.compute", fail)
    monkeypatch.setattr("mlxflow.training.step.Step.add", fail)
    (line,) = job.problems(WorkflowError, method="qat", num_steps=2, batch_size=2)
    assert re.sub(r"[\d.,]+ [GMk]?B", "N", line) == (
        "quantize.batch_size: forward passes of 1 row, the fewest, need N and may use N. Lower "
        'pretokenize.context_length, set quantize.checkpointing = "layers", or raise workflow.memory_limit.'
    )
    (line,) = job.problems(WorkflowError, method="qat", num_steps=2, batch_size=2, checkpointing="layers")
    assert line.endswith(' set quantize.checkpointing = "pairs", or raise workflow.memory_limit.')
    (line,) = job.problems(WorkflowError, method="qat", num_steps=2, batch_size=2, checkpointing="pairs")
    assert line.endswith(" Lower pretokenize.context_length, or raise workflow.memory_limit.")
    assert not job.artifact.exists()


@pytest.mark.parametrize("method", rest_in_matrix(["gptq", "awq", "dwq", "block"], "gptq", "dwq"))
def test_calibrated_methods_lose_less_than_rounding_and_mlx_lm_opens_their_models(job: Job, method: str) -> None:
    job.run(bits=2, group_size=32, max_validation_rows=64)
    rounded = job.tensors()
    report = job.run(method=method, bits=2, group_size=32, calibration_rows=16, max_validation_rows=64)
    learned = job.tensors()
    load_model(job.artifact, strict=True)
    assert report["method"] == method
    assert learned.keys() == rounded.keys()
    path = "model.layers.0.mlp.down_proj"
    assert not mx.array_equal(learned[f"{path}.scales"], rounded[f"{path}.scales"]) or not mx.array_equal(
        learned[f"{path}.weight"], rounded[f"{path}.weight"]
    )


def test_block_reports_its_texts_and_blocks_and_leaves_no_files(job: Job) -> None:
    report = job.run(method="block", bits=2, group_size=32, block_steps=8, max_validation_rows=64)
    rows = TokenFile.open(job.folder / "artifacts/pretokenize/train.safetensors").rows.num_rows
    assert [one["path"] for one in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(0 < one["error_after_training"] < one["error_before_training"] for one in report["blocks"])
    assert report["calibration_text"] == f"64 rows of 16 tokens, from {rows} training rows of pretokenize"
    judging = TokenFile.open(job.folder / "artifacts/pretokenize/validation.safetensors").rows.head(64).num_rows
    assert report["quality"]["text"] == f"{judging} validation rows of pretokenize, 16 tokens each"
    rounded = job.run(bits=2, group_size=32, max_validation_rows=64)
    assert report["quality"]["kl"] < 0.8 * rounded["quality"]["kl"]
    assert report["bits_per_weight"] == rounded["bits_per_weight"]
    assert "calibration_text" not in rounded
    assert not list((job.folder / "artifacts").rglob("block-*.safetensors"))


def test_scales_tuned_after_the_blocks_lose_less_and_variants_share_the_teacher(job: Job) -> None:
    table = {"method": "block", "bits": 2, "group_size": 32, "block_steps": 4, "max_validation_rows": 64}
    blocks = job.run(**table)
    tuned = job.run(**table, scale_steps=24)
    assert tuned["tuning"]["steps"] == 24
    assert tuned["tuning"]["last_loss"] < tuned["tuning"]["first_loss"]
    assert tuned["quality"]["kl"] < blocks["quality"]["kl"]
    assert tuned["bits_per_weight"] == blocks["bits_per_weight"]
    teachers = list((job.folder / "artifacts").rglob("*.teacher.safetensors"))
    written = [file.stat().st_ino for file in teachers]
    assert len(written) == 1
    job.run(**table | {"bits": 3}, scale_steps=1)
    assert [file.stat().st_ino for file in (job.folder / "artifacts").rglob("*.teacher.safetensors")] == written


class Variants:
    """A folder in which the built models lie, and several variants of the quantize stage."""

    def __init__(self, job: Job) -> None:
        self.folder = job.folder

    def write(self, **tables: dict[str, Any]) -> None:
        """Write the workflow with the tables of some variants."""
        head = TINY.read_text().partition("[[quantize]]")[0]
        lines = [head.replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]')]
        for name, table in tables.items():
            values = [f"{key} = {toml_value(value)}" for key, value in table.items()]
            lines += ["[[quantize]]", f'name = "{name}"', "max_validation_rows = 64", *values]
        (self.folder / "workflow.toml").write_text("\n".join(lines) + "\n")

    def run(self, name: str, **tables: dict[str, Any]) -> dict[str, Any]:
        """Run one of some variants in this process and return its report."""
        self.write(**tables)
        workflow = load_workflow(self.folder / "workflow.toml")
        execute_stage(workflow, workflow.find(f"quantize:{name}"))
        return read_report(self.folder / "artifacts/quantize" / name / "report.toml")

    def tensors(self, name: str) -> dict[str, mx.array]:
        """Return what a variant wrote."""
        return cast(
            "dict[str, mx.array]", mx.load(str(self.folder / "artifacts/quantize" / name / "model.safetensors"))
        )


@pytest.fixture
def variants(job: Job) -> Variants:
    return Variants(job)


_BLOCKS = {"method": "block", "bits": 2, "group_size": 32, "block_steps": 4}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("start", "training"),
    [
        (_BLOCKS, "scales"),
        (_BLOCKS, "full"),
        ({"mode": "nvfp4", "method": "block", "block_steps": 2}, "scales"),
        ({"mode": "mxfp4"}, "full"),
        ({"bits": 2, "mode": "symmetric", "method": "awq", "dtype": "bf16"}, "scales"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_qat_starts_from_the_codes_of_another_variant_and_loses_less(
    variants: Variants, start: dict[str, Any], training: str
) -> None:
    after = {"method": "qat", "start": "quantize:a", "training": training, "distill": True, "num_steps": 24}
    tables = {"a": start, "b": {**after, "batch_size": 8}}
    begun, report = variants.run("a", **tables), variants.run("b", **tables)
    assert report["start"] == "quantize:a"
    assert report["bits_per_weight"] == begun["bits_per_weight"]
    assert [(one["bits"], one["mode"], one["group_size"]) for one in report["layers"]] == [
        (one["bits"], one["mode"], one["group_size"]) for one in begun["layers"]
    ]
    assert report["quality"]["kl"] < begun["quality"]["kl"]
    before, trained = variants.tensors("a"), variants.tensors("b")
    codes = [name for name in trained if trained[name].dtype == mx.uint32]
    assert codes
    same = [mx.array_equal(trained[name], before[name]) for name in codes]
    assert all(same) if training == "scales" else not all(same)
    assert mx.array_equal(trained["model.norm.weight"], before["model.norm.weight"]) == (training == "scales")
    load_model(variants.folder / "artifacts/quantize/b", strict=True)


@pytest.mark.matrix
def test_the_model_trained_from_codes_is_the_written_model(variants: Variants) -> None:
    after = {"method": "qat", "start": "quantize:a", "num_steps": 4, "batch_size": 4}
    tables = {"a": _BLOCKS, "b": after, "c": {**after, "training": "scales"}}
    variants.run("a", **tables)
    for name in ("b", "c"):
        variants.run(name, **tables)
        folder = variants.folder / "artifacts/quantize" / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "validation"][-1]
        rows = TokenFile.open(variants.folder / "artifacts/pretokenize/validation.safetensors").rows.head(64)
        model = for_evaluation(load(folder)[0])
        assert measure_perplexity(model, rows, batch_size=4).loss == pytest.approx(last["loss"], rel=1e-6)


@pytest.mark.matrix
def test_scales_are_trained_without_a_variant_to_start_from(job: Job) -> None:
    rounded = job.run(bits=2, group_size=32, max_validation_rows=64)
    table = {"method": "qat", "training": "scales", "distill": True, "bits": 2, "group_size": 32, "batch_size": 8}
    report = job.run(**table, num_steps=24, max_validation_rows=64)
    assert report["quality"]["kl"] < 0.9 * rounded["quality"]["kl"]
    assert "start" not in report


@pytest.mark.matrix
def test_interrupted_training_from_codes_resumes_to_the_same_bytes(
    variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = {"method": "qat", "start": "quantize:a", "distill": True, "num_steps": 6, "batch_size": 4}
    tables = {"a": _BLOCKS, "b": after}
    variants.run("a", **tables)
    variants.run("b", **tables)
    folder = variants.folder / "artifacts/quantize/b"
    whole = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    _stop_training(monkeypatch, step=3)
    with pytest.raises(SystemExit):
        variants.run("b", **tables)
    monkeypatch.undo()
    variants.run("b", **tables)
    assert (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.matrix
def test_variants_share_the_teacher_until_the_model_or_the_text_changes(variants: Variants) -> None:
    table = {"method": "qat", "distill": True, "num_steps": 2, "batch_size": 4, "bits": 2}
    tables = {"a": table, "b": {**table, "bits": 3, "training": "scales"}}

    def teachers() -> dict[str, int]:
        files = (variants.folder / "artifacts").rglob("*.teacher.safetensors")
        return {file.name: file.stat().st_ino for file in files}

    first = variants.run("a", **tables)["teacher"]
    found = teachers()
    assert list(found) == [first["file"]]
    assert first["tokens"] == 8 * 16
    assert variants.run("b", **tables)["teacher"] == first
    assert teachers() == found
    path = variants.folder / "artifacts/train/model.safetensors"
    tensors = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    other = variants.run("a", **tables)["teacher"]["file"]
    assert other != first["file"]
    (variants.folder / "notes/more.txt").write_text("another text entirely, and more of it than before\n" * 40)
    workflow = load_workflow(variants.folder / "workflow.toml")
    execute_stage(workflow, workflow.find("pretokenize"))
    assert variants.run("a", **tables)["teacher"]["file"] not in (other, first["file"])


@pytest.mark.matrix
def test_a_variant_is_built_after_the_one_that_it_starts_from_and_has_its_settings(variants: Variants) -> None:
    a = {"bits": 3, "group_size": 32, "layers": [{"match": "*embed*", "bits": 8}], "dtype": "keep"}
    variants.write(b={"method": "qat", "start": "quantize:a", "num_steps": 2}, a=a)
    workflow = load_workflow(variants.folder / "workflow.toml")
    tasks = [one.task for one in workflow.stages]
    assert tasks.index("quantize:a") < tasks.index("quantize:b")
    own, other = (cast("Config", workflow.find(f"quantize:{name}").config) for name in "ba")
    for key in ("bits", "group_size", "layers", "dtype", "mode"):
        assert getattr(own, key) == getattr(other, key)
    inputs = cast("Any", workflow.find("quantize:b").inputs)
    assert [path.as_posix() for path in inputs.start] == [
        "artifacts/quantize/a/model.safetensors",
        "artifacts/quantize/a/report.toml",
    ]
    check_plans(workflow)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("start", "table", "line"),
    [
        (
            {"bits": 2},
            {"bits": 3},
            "quantize[1].bits = 3: starts from quantize:a, which has 2. Set bits = 2.",
        ),
        (
            {"bits": 2},
            {"method": "rtn"},
            'quantize[1].start = "quantize:a": method rtn does not start from codes. Set method = "qat".',
        ),
        (
            {"mode": "mxfp4"},
            {"training": "scales"},
            'quantize[1].training = "scales": scales of mxfp4 are powers of two, which are not trained. '
            'Set training = "full".',
        ),
        (
            {"bits": 2},
            {"training": "lora"},
            'quantize[1].training = "lora": adapters start from dense weights. Set training = "full" or "scales", or '
            "remove start.",
        ),
        (
            {"bits": 2},
            {"target_bits_per_weight": 3.0},
            "quantize[1].target_bits_per_weight = 3.0: the bits are those of start. Remove target_bits_per_weight.",
        ),
    ],
)
def test_keys_that_contradict_the_variant_to_start_from_are_an_error(
    variants: Variants, start: dict[str, Any], table: dict[str, Any], line: str
) -> None:
    variants.write(a=start, b={"method": "qat", "start": "quantize:a", **table})
    with pytest.raises(WorkflowError) as caught:
        load_workflow(variants.folder / "workflow.toml")
    assert line in str(caught.value)


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["rtn", "block", "qat"])
def test_a_rotated_model_is_quantized_and_compared_with_the_dense_one(job: Job, method: str) -> None:
    path = job.folder / "artifacts/train/model.safetensors"
    tensors = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(tensors)
    config = json.loads((path.parent / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    for name in tensors:  # an outlier of each head that R2 spreads over it
        if ".o_proj" in name:
            tensors[name][:, 3::size] = tensors[name][:, 3::size] * 20
        elif ".v_proj" in name:
            tensors[name][3::size] = tensors[name][3::size] / 20
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    table = {"method": method, "bits": 2, "group_size": 32, "block_steps": 4, "num_steps": 4, "batch_size": 4}
    report = job.run(**table, rotations=3, max_validation_rows=64)
    rotation = report["rotation"]
    assert rotation["is_kept"] == (rotation["divergence"] < rotation["divergence_without"])
    assert rotation["is_kept"]
    plain = job.run(**table, max_validation_rows=64)
    assert "rotation" not in plain
    assert report["bits_per_weight"] == plain["bits_per_weight"]
    assert report["quality"]["dense_perplexity"] == plain["quality"]["dense_perplexity"]
    if method == "rtn":
        assert report["quality"]["kl"] < plain["quality"]["kl"]


def test_fewer_calibration_rows_than_requested_are_a_warning(job: Job) -> None:
    marks = TokenFile.open(job.folder / "artifacts/pretokenize/train.safetensors").rows.marks
    rows = np.count_nonzero(marks) // marks.shape[1]
    report = job.run(method="block", bits=4, block_steps=0, calibration_rows=100_000)
    assert report["warnings"][-1] == (
        f"quantize.calibration_rows = 100000: the training text of pretokenize fills {rows} rows of 16 tokens, and the "
        "method learned these. Add text to its sources, or lower the number."
    )


def test_a_method_that_is_worse_than_rounding_is_a_warning(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "warnings" not in job.run(method="gptq", bits=4, max_validation_rows=64)
    plain = calibrated.learn

    def spoilt(*arguments: Any, **settings: Any) -> Any:
        learned = plain(*arguments, **settings)
        return {path: codes._replace(scales=codes.scales * 2) for path, codes in learned.items()}

    monkeypatch.setattr(calibrated, "learn", spoilt)
    (warning,) = job.run(method="gptq", bits=4, max_validation_rows=64, calibration_rows=8)["warnings"]
    assert warning in capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"quantize: gptq is worse than rounding to nearest: its divergence from the dense model is [\d.]+ nats, "
        r"that of rounding [\d.]+ \(16 validation rows\)\. "
        r'Set quantize\.method = "rtn", or calibrate on more text of this kind\.',
        warning,
    )


def test_a_size_budget_is_met_and_its_rules_reproduce_the_model(job: Job) -> None:
    report = job.run(target_bits_per_weight=4.7, calibration_rows=16, dtype="keep")
    assert 0.99 * 4.7 <= report["bits_per_weight"] <= 4.7
    assert len({row["bits"] for row in report["layers"]} - {0}) > 1
    tensors = job.tensors()
    mx.eval(tensors)
    import tomllib

    layers = tomllib.loads(report["layers_toml"])["layers"]
    job.run(layers=layers, dtype="keep")
    assert all(mx.array_equal(value, tensors[name]) for name, value in job.tensors().items())
    by_size = job.run(target_size="48 KB", calibration_rows=16, dtype="keep")
    assert 0.95 * 48_000 < by_size["model_bytes"] <= 48_000  # of the file, its header included


_BUDGETS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {},
    "awq": {"candidate_bits": [2, 4]},
    "dwq": {"candidate_bits": [2, 4]},
    "block": {"candidate_bits": [2, 4], "block_steps": 4, "scale_steps": 2},
    "qat": {"num_steps": 4, "batch_size": 4},
}


@pytest.mark.matrix
@pytest.mark.parametrize("method", _BUDGETS)
def test_the_plan_of_a_budget_is_measured_with_its_method_and_never_worse_than_a_uniform_one(
    job: Job, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table = {"method": method, "target_bits_per_weight": 3.6, "calibration_rows": 16, "max_validation_rows": 32}
    report = job.run(**table, candidate_group_sizes=[32, 64], **_BUDGETS[method])
    made = report["budget"]
    (chosen,) = [one for one in made["plans"] if one["is_chosen"]]
    assert made["measured_with"] == ("grids to begin with" if method == "qat" else method)
    assert made["plans"][0]["name"] == "mixed"
    assert len(made["plans"]) > 1
    assert chosen["divergence"] == min(one["divergence"] for one in made["plans"])
    assert all(one["bits_per_weight"] <= 3.6 for one in made["plans"])
    assert report["bits_per_weight"] <= 3.6
    quantized = [one for one in report["layers"] if one["bits"]]
    assert {one["group_size"] for one in quantized} <= {32, 64}
    assert "model.embed_tokens" in {one["path"] for one in quantized}  # which is the head, too
    assert f"{chosen['name']} is taken" in capfd.readouterr().err
    load_model(job.artifact, strict=True)
    assert not list((job.folder / "artifacts").rglob("block-*.safetensors"))


@pytest.mark.matrix
def test_a_uniform_plan_is_taken_if_it_loses_less_than_the_mixed_one(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlxflow.quantization.sensitivity import measure_costs

    def misleading(model: Any, candidates: Any, *arguments: Any, **named: Any) -> Any:
        costs = measure_costs(model, candidates, *arguments, **named)
        return {path: {one: -cost for one, cost in options.items()} for path, options in costs.items()}

    monkeypatch.setattr("mlxflow.quantization.budget_choice.measure_costs", misleading)
    report = job.run(target_bits_per_weight=4.6, calibration_rows=16, max_validation_rows=32)
    (chosen,) = [one for one in report["budget"]["plans"] if one["is_chosen"]]
    ((bits, size),) = {(one["bits"], one["group_size"]) for one in report["layers"] if one["bits"]}
    assert chosen["name"] == f"uniform {bits} bits, groups of {size}"
    shown = f"{chosen['name']} is taken, since it diverges less than the mixed one"
    assert shown in capfd.readouterr().err


@pytest.mark.matrix
def test_costs_that_mislead_are_corrected_at_the_plans_that_were_measured(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlxflow.quantization import budget_choice
    from mlxflow.quantization.sensitivity import measure_costs

    def misleading(model: Any, candidates: Any, *arguments: Any, **named: Any) -> Any:
        costs = measure_costs(model, candidates, *arguments, **named)
        own = {one: 0.01 * cost for one, cost in costs["model.embed_tokens"].items()}
        return costs | {"model.embed_tokens": own}

    monkeypatch.setattr("mlxflow.quantization.budget_choice.measure_costs", misleading)
    table = {"target_bits_per_weight": 4.0, "calibration_rows": 16, "max_validation_rows": 32}
    report = job.run(**table, candidate_group_sizes=[32, 64])
    plans = {one["name"]: one for one in report["budget"]["plans"]}
    (chosen,) = [name for name, one in plans.items() if one["is_chosen"]]
    bits = {one["path"]: one["bits"] for one in report["layers"]}
    assert chosen in {"mixed 2", "mixed 3"}
    assert plans[chosen]["divergence"] < 0.8 * plans["mixed"]["divergence"]
    assert all(one["bits_per_weight"] <= 4.0 for one in plans.values())
    assert f"{chosen} is taken\n" in capfd.readouterr().err
    monkeypatch.setattr(budget_choice, "CORRECTIONS", {})
    first = job.run(**table, candidate_group_sizes=[32, 64])
    assert {one["path"]: one["bits"] for one in first["layers"]}["model.embed_tokens"] < bits["model.embed_tokens"]
    assert not {one["name"] for one in first["budget"]["plans"]} & {"mixed 2", "mixed 3"}


@pytest.mark.matrix
def test_a_rule_keeps_its_bits_and_its_group_size_under_a_budget(job: Job) -> None:
    layers = [{"match": "*embed_tokens", "bits": 8, "group_size": 32}, {"match": "*.down_proj", "group_size": 64}]
    report = job.run(target_bits_per_weight=5.5, calibration_rows=16, layers=layers, max_validation_rows=32)
    found = {one["path"]: (one["bits"], one["group_size"]) for one in report["layers"]}
    assert found["model.embed_tokens"] == (8, 32)
    assert all(size == 64 for path, (_, size) in found.items() if path.endswith("down_proj"))
    assert len({size for path, (_, size) in found.items() if path.endswith("proj")}) > 1


@pytest.mark.matrix
def test_candidates_that_gptq_does_not_have_are_an_error(job: Job) -> None:
    (line,) = job.problems(UserError, method="gptq", target_bits_per_weight=3.5, candidate_bits=[3])
    assert line == "quantize.candidate_bits: mlx-lm's GPTQ has 2, 4 and 8 bits. Name one of them."


def test_a_model_of_the_hub_is_its_own_teacher(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "fetch", lambda *_, **__: job.folder / "artifacts/train")
    table = {"method": "qat", "bits": 2, "num_steps": 2, "batch_size": 4, "max_validation_rows": 8}
    report = job.run(model="owner/name", data="pretokenize", distill=True, **table)
    assert report["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        ({"bits": 2, "dtype": "bf16"}, "bf16"),
        ({"mode": "mxfp4"}, "fp32"),
        ({"bits": 2, "method": "gptq", "dtype": "keep"}, "fp32"),
        ({"bits": 3, "method": "awq", "dtype": "keep"}, "fp32"),
        ({"bits": 3, "method": "dwq", "dtype": "keep"}, "fp32"),
        ({"bits": 2, "method": "block", "block_steps": 2, "dtype": "keep"}, "fp32"),
        ({"bits": 3, "method": "dwq"}, "bf16"),  # rows of the embedding are in bf16, as its scales
        ({"bits": 2, "method": "qat", "num_steps": 4, "batch_size": 4, "dtype": "keep"}, "fp32"),
        ({"bits": 2, "method": "qat", "num_steps": 4, "batch_size": 4, "dtype": "bf16", "training": "lora"}, "bf16"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_reported_perplexity_is_that_of_the_files(job: Job, table: dict[str, Any], dtype: str) -> None:
    quality = job.run(max_validation_rows=24, calibration_rows=16, **table)["quality"]
    validation = job.folder / "artifacts/pretokenize/validation.safetensors"
    for key, folder, tolerance in (
        ("perplexity", job.artifact, LOSS_TOLERANCE[dtype]),
        ("dense_perplexity", job.folder / "artifacts/train", LOSS_TOLERANCE["fp32"]),
    ):
        expected = validation_loss(open_with_mlx_lm(folder)[0], validation, 24)
        assert math.log(quality[key]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("table", [{}, {"method": "block", "block_steps": 2, "scale_steps": 2}])
def test_a_16_bit_model_is_measured_on_a_cpu_as_its_fp32_copy(job: Job, table: dict[str, Any]) -> None:
    dense = job.folder / "artifacts/train"
    weights = cast("dict[str, mx.array]", mx.load(str(dense / "model.safetensors")))
    narrow = {name: value.astype(mx.float16) for name, value in weights.items()}
    mx.save_safetensors(str(dense / "model.safetensors"), narrow, {"format": "mlx"})
    report = job.run(bits=4, dtype="fp16", max_validation_rows=24, calibration_rows=16, **table)
    rows = TokenFile.open(job.folder / "artifacts/pretokenize/validation.safetensors").rows.head(24)
    for key, folder in (("dense_perplexity", dense), ("perplexity", job.artifact)):
        model = load(folder)[0]
        if mx.default_device() == mx.cpu:
            model.update(
                tree_map(lambda one: one.astype(mx.float32) if one.dtype == mx.float16 else one, model.parameters())
            )
        measured = measure_perplexity(model, rows, batch_size=32)
        # fp32; the same in fp16 differs by about 1e-3
        assert math.log(report["quality"][key]) == pytest.approx(measured.loss, abs=LOSS_TOLERANCE["fp32"])
    assert job.tensors()["model.layers.0.mlp.up_proj.scales"].dtype == mx.float16
    (reference,) = (job.folder / "artifacts/.mlxflow/evaluations").iterdir()
    hidden = cast("dict[str, mx.array]", mx.load(str(reference)))["hidden"]
    assert hidden.dtype == (mx.float32 if mx.default_device() == mx.cpu else mx.float16)


def test_quality_is_measured_against_the_dense_model(job: Job) -> None:
    quality = job.run(bits=2, max_validation_rows=64)["quality"]
    rows = TokenFile.open(job.folder / "artifacts/pretokenize/validation.safetensors").rows.head(64)
    dense, quantized = (for_evaluation(load(path)[0]) for path in (job.folder / "artifacts/train", job.artifact))
    logits = [model(mx.array(rows.tokens[:, :-1].astype(np.int32))).astype(mx.float32) for model in (dense, quantized)]
    logs = [np.array(one - mx.logsumexp(one, axis=-1, keepdims=True), np.float64) for one in logits]
    counted = (rows.marks[:, 1:] & 1) == 1
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)[counted].mean()
    same = (logs[0].argmax(-1) == logs[1].argmax(-1))[counted].mean()
    assert quality["kl"] == pytest.approx(kl, rel=1e-4)
    assert quality["top1_agreement"] == pytest.approx(same)
    for key, model in (("dense_perplexity", dense), ("perplexity", quantized)):
        measured = measure_perplexity(model, rows, batch_size=32)
        assert quality[key] == pytest.approx(measured.perplexity, rel=1e-5)
        assert quality[f"{key}_standard_error"] == pytest.approx(measured.standard_error, rel=1e-3)
    assert quality["perplexity"] > quality["dense_perplexity"]
    again = measure_divergence(dense, dense, rows, batch_size=32, masks_documents=False)
    assert (again.kl, again.top1_agreement) == (0, 1)


def test_an_exceeded_quality_limit_publishes_nothing_and_names_three_layers(job: Job) -> None:
    job.run(bits=8)
    before = (job.artifact / "model.safetensors").read_bytes()
    lines = job.problems(StageError, bits=2, max_perplexity_increase=0.001, max_kl=0.01)
    assert [line.partition(":")[0] for line in lines] == [
        "quantize.max_perplexity_increase = 0.001",
        "quantize.max_kl = 0.01",
    ]
    for line in lines:
        assert line.count("nats)") == 3
        assert "Costs most: model." in line
    assert (job.artifact / "model.safetensors").read_bytes() == before
    assert job.run(bits=8, max_perplexity_increase=0.5, max_kl=0.5)["quality"]["kl"] < 0.5


def test_a_local_model_is_quantized_without_training_or_tokens(job: Job) -> None:
    own = job.folder / "own"
    shutil.copytree(job.folder / "artifacts/train", own)
    (own / "generation_config.json").write_text("{}")
    (own / "README.md").write_text("another model's")
    shutil.rmtree(job.folder / "artifacts")
    report = job.run(model="own", dtype="bf16")
    assert "quality" not in report
    assert report["compression_ratio_fp32"] == pytest.approx(2 * report["compression_ratio_bf16"])
    assert {path.name for path in job.artifact.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "report.toml", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((job.artifact / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {str(value.dtype) for name, value in job.tensors().items() if "scales" in name} == {"mlx.core.bfloat16"}
    shutil.copytree(job.artifact, job.folder / "small")
    assert [line.partition("workflow.toml: ")[2] for line in job.problems(WorkflowError, model="small")] == [
        'quantize.model = "small": is quantized already, and what was lost does not come back. Name a dense model, or '
        "set requantize = true."
    ]
    assert job.run(model="small", requantize=True, bits=2)["bits_per_weight"] < report["bits_per_weight"]


def test_a_model_whose_numbers_are_not_finite_is_not_published(job: Job) -> None:
    path = job.folder / "artifacts/train/model.safetensors"
    tensors = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(tensors)
    tensors["model.norm.weight"] = mx.full(tensors["model.norm.weight"].shape, 3.4e38)  # finite, and no logit is
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    assert job.problems(StageError) == [
        "quantize: the quantized model returns numbers that are not finite on validation rows. "
        "Use more bits, or another method."
    ]
    assert not job.artifact.exists()


def test_a_weight_that_is_not_finite_is_named(job: Job) -> None:
    path = job.folder / "artifacts/train/model.safetensors"
    tensors = cast("dict[str, mx.array]", mx.load(str(path)))
    mx.eval(tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float("inf")
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    assert job.problems(ArtifactError) == [
        f"{path.parent}: {name}: 1 of 4,096 values are not finite. Train or fetch the model again."
    ]
    assert not job.artifact.exists()


@pytest.mark.parametrize(
    ("kind", "table", "line"),
    [
        (
            WorkflowError,
            {"layers": [{"match": "lm_head", "bits": 8}]},
            'quantize.layers[0].match = "lm_head": matches no layer. The head of this model is its embedding. '
            "Match model.embed_tokens.",
        ),
        (
            WorkflowError,
            {"target_bits_per_weight": 2.5},
            "quantize.target_bits_per_weight = 2.5: the least possible is 2.500 bits per weight",
        ),
        (
            UserError,
            {"method": "gptq", "bits": 3},
            'quantize.method = "gptq": mlx-lm\'s GPTQ has 2, 4 and 8 bits, and model.layers.0.self_attn.q_proj has 3. '
            "Use one of them.",
        ),
        (UserError, {"method": "dwq", "mode": "symmetric"}, 'quantize.method = "dwq": trains scales and biases apart'),
        (
            UserError,
            {"method": "block", "mode": "symmetric", "scale_steps": 5},
            "quantize.scale_steps = 5: trains affine layers, and the plan has none. "
            'Set mode = "affine", or scale_steps = 0.',
        ),
        (UserError, {"model": "nowhere"}, 'quantize.model = "nowhere": no such folder'),
        (UserError, {"model": "notes"}, 'quantize.model = "notes": has no config.json. Name a model folder.'),
        (
            UserError,
            {"model": "artifacts/train", "method": "awq"},
            'quantize.method = "awq": needs tokens, and data names none. Set data = "pretokenize".',
        ),
        (
            UserError,
            {"target_size": "1 MB", "target_bits_per_weight": 4.0},
            'quantize.target_size = "1 MB": expected one budget, not two. Remove target_bits_per_weight.',
        ),
    ],
)
def test_contradicting_quantize_keys_are_an_error(
    job: Job, kind: type[Exception], table: dict[str, Any], line: str
) -> None:
    (found,) = job.problems(kind, **table)
    assert found.rpartition("workflow.toml: ")[2].startswith(line)
    assert not job.artifact.exists()


def test_rows_longer_than_the_models_positions_are_an_error(job: Job) -> None:
    config = job.folder / "artifacts/train/config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 16', '"max_position_embeddings": 8'))
    (line,) = job.problems(ArtifactError)
    assert line == (
        f'quantize.data = "pretokenize": its rows have 16 tokens, {config.parent} is made for 8 positions. '
        "Lower pretokenize.context_length."
    )


def test_check_validates_the_plan_without_artifacts(job: Job) -> None:
    shutil.rmtree(job.folder / "artifacts")
    job.write(layers=[{"match": "*.embed_tokens", "bits": 8}, {"match": "*.mlp.upproj", "bits": 2}])
    with pytest.raises(WorkflowError) as caught:
        check_plans(load_workflow(job.folder / "workflow.toml"))
    assert str(caught.value).rpartition("workflow.toml: ")[2] == (
        'quantize.layers[1].match = "*.mlp.upproj": matches no layer. Did you mean model.layers.1.mlp.up_proj?'
    )
    result = mlxflow(job.folder, "check")
    assert (result.returncode, result.stdout) == (2, "")
    job.write(layers=[{"match": "*.embed_tokens", "bits": 8}])
    check_plans(load_workflow(job.folder / "workflow.toml"))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {"method": "gptq", "bits": 3},
            'quantize.method = "gptq": mlx-lm\'s GPTQ has 2, 4 and 8 bits, and LAYER has 3. Use one of them.',
        ),
        (
            {"method": "block", "layers": [{"match": "model.layers.*", "skip": True}]},
            'quantize.method = "block": the plan has no layer that it could learn. Leave one of the blocks\' to be '
            "quantized.",
        ),
        (
            {"method": "block", "mode": "mxfp4", "scale_steps": 3},
            "quantize.scale_steps = 3: trains affine layers, and the plan has none. "
            'Set mode = "affine", or scale_steps = 0.',
        ),
    ],
)
def test_a_method_that_does_not_support_the_plan_is_refused_before_anything_is_computed(
    job: Job, table: dict[str, Any], line: str
) -> None:
    (found,) = job.problems(UserError, **table)
    assert re.sub(r"model\.layers\.0\.[\w.]+\w", "LAYER", found) == line
    shutil.rmtree(job.folder / "artifacts")
    with pytest.raises(WorkflowError) as caught:
        check_plans(load_workflow(job.folder / "workflow.toml"))
    found = str(caught.value).rpartition("workflow.toml: ")[2]
    assert re.sub(r"model\.layers\.0\.[\w.]+\w", "LAYER", found) == line


@pytest.mark.matrix
@pytest.mark.parametrize("budget", [{}, {"target_bits_per_weight": 3.6, "candidate_bits": [2, 4]}])
def test_a_block_run_that_ends_in_the_middle_resumes_after_its_last_block_to_the_same_bytes(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], budget: dict[str, Any]
) -> None:
    from mlxflow.quantization import block_method
    from mlxflow.quantization.block_training import train_block

    table = {"method": "block", "block_steps": 4, "calibration_rows": 16, "candidate_group_sizes": [64], **budget}
    job.run(**table)
    whole = (job.artifact / "model.safetensors").read_bytes()
    shutil.rmtree(job.artifact)
    calls = 0

    def ended(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train_block(*arguments, **named)

    monkeypatch.setattr(block_method, "train_block", ended)
    with pytest.raises(KeyboardInterrupt):
        job.run(**table)
    monkeypatch.undo()
    assert not job.artifact.exists()
    (first,) = (job.folder / "artifacts").rglob("block-0.safetensors")
    inode = first.stat().st_ino
    learned: list[int] = []
    learn = block_method._BlockWork.learn

    def counted(self: Any, number: int, call: Any) -> None:
        if first.exists():
            assert first.stat().st_ino == inode
        learned.append(number)
        learn(self, number, call)

    monkeypatch.setattr(block_method._BlockWork, "learn", counted)
    capsys.readouterr()
    job.run(**table)
    assert ("; 1 of 2 blocks are done, which is not counted\n" in capsys.readouterr().err) == (not budget)
    assert learned[0] == 1  # block 0 was finished
    assert (job.artifact / "model.safetensors").read_bytes() == whole
    assert not list((job.folder / "artifacts").rglob("block-*.safetensors"))


def test_show_prints_each_layer_with_its_bits_and_error(job: Job) -> None:
    report = job.run(bits=3, layers=[{"match": "*embed*", "skip": True}])
    result = mlxflow(job.folder, "show", "quantize")
    assert result.returncode == 0, result.stderr
    cells = [line.strip("| ").split() for line in result.stdout.splitlines() if line.startswith("| model.")]
    lines = {row[0]: [cell for cell in row if cell != "|"] for row in cells}
    assert lines.keys() == {row["path"] for row in report["layers"]}
    assert lines["model.embed_tokens"][4:7] == ["dense", "-", "-"]
    shown = lines["model.layers.0.mlp.up_proj"]
    assert shown[1:7] == ["64", "x", "64", "affine", "3", "64"]
    assert float(shown[-1]) == pytest.approx(report["layers"][-1]["relative_error"], rel=0.2)
    assert f" parameters in {show_bytes(report['model_bytes'])}, " in result.stdout
