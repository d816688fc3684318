"""That each key of `[train]` and the seed do what they say, on the tiny workflow's tokens."""

import json
import re
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxflow.messages.errors import StageError
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow

FEW_STEPS = """
[workflow]
seed = 0
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 4
warmup_steps = 1
batch_size = 4
learning_rate = 0.01
weight_decay = 0.1
betas = [0.9, 0.95]
max_grad_norm = 1.0
log_every = 1
eval_every = 0
max_validation_rows = 8
[train.model]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 2
intermediate_size = 32
tie_word_embeddings = true
rope_theta = 10000.0
"""


def _train(project: Path, folder: Path, *changes: str) -> Path:
    """Train with some lines of FEW_STEPS changed and return the artifact."""
    text = FEW_STEPS
    for change in changes:
        text, count = re.subn(rf"(?m)^{change.split(' = ')[0]} = .*$", change, text)
        assert count == 1, change
    workflow = project / f"{folder.name}.toml"
    workflow.write_text(text)
    loaded = load_workflow(workflow)
    return execute_stage(loaded, loaded.find("train"), folder)


def _weights(folder: Path) -> dict[str, mx.array]:
    weights = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    return weights


def _same(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]) for name in first)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def usual(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(project, tmp_path_factory.mktemp("few") / "usual")


@pytest.mark.parametrize(
    "change",
    [
        "seed = 1",
        "num_steps = 5",
        "warmup_steps = 2",
        "batch_size = 5",
        "learning_rate = 0.011",
        "weight_decay = 0.5",
        "betas = [0.8, 0.95]",
        "betas = [0.9, 0.99]",
        "max_grad_norm = 0.1",
        "hidden_size = 64",
        "num_layers = 1",
        "num_heads = 4",
        "num_kv_heads = 1",
        "intermediate_size = 48",
        "tie_word_embeddings = false",
        "rope_theta = 100.0",
    ],
)
def test_a_key_that_shapes_the_model_changes_it(project: Path, usual: Path, tmp_path: Path, change: str) -> None:
    assert not _same(_weights(_train(project, tmp_path / "changed", change)), _weights(usual))


@pytest.mark.parametrize("change", ["log_every = 3", "eval_every = 1", "max_validation_rows = 3"])
def test_a_logging_key_changes_no_weight(project: Path, usual: Path, tmp_path: Path, change: str) -> None:
    changed = _train(project, tmp_path / "changed", change)
    assert _same(_weights(changed), _weights(usual))
    assert _records(changed) != _records(usual)


def test_the_config_has_the_requested_shape(usual: Path) -> None:
    config = json.loads((usual / "config.json").read_text())
    wanted = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    wanted |= {"intermediate_size": 32, "max_position_embeddings": 16, "vocab_size": 300, "eos_token_id": 0}
    assert wanted.items() <= config.items()


def test_the_learning_rate_warms_up_and_falls(project: Path, tmp_path: Path) -> None:
    folder = _train(project, tmp_path / "rates", "num_steps = 8", "warmup_steps = 4")
    rates = [record["learning_rate"] for record in _records(folder) if record["kind"] == "train"]
    assert rates.index(max(rates)) in (3, 4)
    assert max(rates) == pytest.approx(0.01, rel=1e-3)
    assert rates[0] < rates[1] < rates[2]
    assert rates[5] > rates[6] > rates[7]


def test_the_default_warmup_takes_at_most_half_of_the_steps(project: Path, tmp_path: Path) -> None:
    half = _train(project, tmp_path / "half", "warmup_steps = 2")
    whole = _train(project, tmp_path / "whole", 'warmup_steps = "auto"')
    assert _same(_weights(half), _weights(whole))


def test_a_far_too_high_learning_rate_fails_and_keeps_the_old_artifact(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "report.toml").write_text('[stage]\nstage = "train"\n')
    said = (
        r"^train: 10 steps in a row had no finite loss and gradient, the last being step \d+ \(loss .*\) with learning"
    )
    with pytest.raises(StageError, match=said):
        _train(project, folder, "learning_rate = 1e6", "warmup_steps = 0", "num_steps = 40")
    assert [path.name for path in folder.iterdir()] == ["report.toml"]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


WORSE = ("learning_rate = 3.0", "max_grad_norm = 0.0")


def test_a_run_that_ends_worse_than_it_began_warns_in_its_last_line(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _train(project, tmp_path / "worse", *WORSE)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('train.keep = "last": the published weights are worse than the start: perplexity ')
    report = (folder / "report.toml").read_text()
    assert report.startswith('warning = "train.keep = \\"last\\": the published weights are worse than the start: ')
    assert last.replace('"', '\\"') in report.splitlines()[0]


def test_a_required_improvement_fails_and_leaves_the_artifact_as_it_was(project: Path, tmp_path: Path) -> None:
    folder = _train(project, tmp_path / "artifact")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StageError, match=r"^train\.require_improvement = true: perplexity .* nothing is published\. "):
        _train(project, folder, *WORSE, "weight_decay = 0.1\nrequire_improvement = true")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("checkpointing", ["none", "auto"])
def test_a_training_says_whether_it_fits_before_its_first_step(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], checkpointing: str
) -> None:
    _train(project, tmp_path / "a", f'log_every = 1\ncheckpointing = "{checkpointing}"')
    said = capfd.readouterr().err.splitlines()
    (line,) = (number for number, one in enumerate(said) if "in a step with passes of 64 tokens" in one)
    assert re.match(r"train: about .* in a step with passes of 64 tokens: fits into the .* allowed$", said[line])
    choices = [number for number, one in enumerate(said) if one.startswith('train.checkpointing = "auto": ')]
    assert len(choices) == (checkpointing == "auto")
    assert all(number < line for number in choices)
    assert not [one for one in said[:line] if "step 1" in one]
