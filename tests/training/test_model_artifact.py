"""What `train` says of its model's quality is true of the files that it wrote."""

import json
import math
from pathlib import Path

import pytest

from mlxflow.evaluation.perplexity import Perplexity
from mlxflow.storage.report_files import read_report
from mlxflow.training.figures import TrainingFigures
from mlxflow.training.model_artifact import quality_of, warn_of_loss
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.independent import LOSS_TOLERANCE, open_with_mlx_lm, validation_loss

MAX_ROWS = 24

HEAD = f"""
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = {{{{ vocab_size = 300 }}}}
[train]
num_steps = 8
batch_size = 4
warmup_steps = 0
learning_rate = {{rate}}
eval_every = 4
max_validation_rows = {MAX_ROWS}
"""
BASE = 'model.from = "artifacts/train"\n'


def _train(project: Path, folder: Path, text: str, learning_rate: float = 3e-3) -> Path:
    workflow = project / f"{folder.name}.toml"
    workflow.write_text(HEAD.format(rate=learning_rate) + text)
    loaded = load_workflow(workflow)
    return execute_stage(loaded, loaded.find("train"), folder / "made")


def _loss_of_files(project: Path, made: Path) -> float:
    """Return the loss of an artifact on the validation rows, computed by mlx-lm's model and NumPy."""
    model, _ = open_with_mlx_lm(made)
    return validation_loss(model, project / "artifacts/pretokenize/validation.safetensors", MAX_ROWS)


@pytest.mark.parametrize(("method", "precision"), [("full", "bf16"), ("lora", "fp32"), ("dora", "bf16")])
def test_reported_perplexity_is_that_of_the_files(project: Path, tmp_path: Path, method: str, precision: str) -> None:
    made = _train(project, tmp_path, f'{BASE}method = "{method}"\nprecision = "{precision}"\n')
    report = read_report(made / "report.toml")
    expected = pytest.approx(_loss_of_files(project, made), abs=LOSS_TOLERANCE[precision])
    assert math.log(report["last_validation_perplexity"]) == expected
    assert report["gain_kept"] > 0.95


def test_reported_perplexity_is_that_of_the_best_weights_if_they_are_kept(project: Path, tmp_path: Path) -> None:
    made = _train(project, tmp_path, BASE + 'keep = "best"\n', learning_rate=0.5)
    report = read_report(made / "report.toml")
    found = math.log(report["last_validation_perplexity"])
    assert found == pytest.approx(_loss_of_files(project, made), abs=LOSS_TOLERANCE["fp32"])
    assert found == pytest.approx(math.log(report["best_validation_perplexity"]), abs=LOSS_TOLERANCE["fp32"])
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "validation"][-1] > found + 0.1


def _figures(first: float, trained: float) -> TrainingFigures:
    return TrainingFigures(
        steps=1,
        tokens=1,
        skipped_steps=0,
        first_validation_perplexity=math.exp(first),
        trained_validation_perplexity=math.exp(trained),
        best_validation_perplexity=math.exp(trained),
        best_validation_step=1,
    )


def test_kept_gain_is_a_share_of_the_loss_reduction_of_training() -> None:
    found = quality_of(_figures(2.0283, 1.9468), Perplexity(2.0043, math.exp(2.0043), 0.01, 100))
    assert found.gain_kept == pytest.approx((2.0283 - 2.0043) / (2.0283 - 1.9468))
    assert found.last_validation_perplexity == math.exp(2.0043)


def test_without_a_loss_reduction_there_is_no_kept_gain() -> None:
    assert quality_of(_figures(2.0, 2.1), Perplexity(2.1, math.exp(2.1), 0.01, 100)).gain_kept is None


@pytest.mark.parametrize(
    ("artifact", "expected"),
    [
        (1.9468, None),
        (
            2.0043,
            "train: the artifact keeps 29% of what training gained: perplexity 7.601 before, 7.006 trained, 7.421 in "
            "the files.",
        ),
        (
            2.1,
            "train: the artifact lost what was gained: perplexity 7.601 before, 7.006 trained, 8.166 in the files.",
        ),
    ],
)
def test_an_artifact_that_lost_the_gain_of_training_is_warned_about(artifact: float, expected: str | None) -> None:
    figures = _figures(2.0283, 1.9468)
    quality = quality_of(figures, Perplexity(artifact, math.exp(artifact), 0.01, 100))
    assert warn_of_loss(figures, quality, fuse="", task="train") == expected
