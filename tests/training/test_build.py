"""profile and benchmark take the steps that training took: the same losses and weights to the bit."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import TokenFile
from mlxflow.profiling.profiled_step import profiled_steps
from mlxflow.stages import benchmark, profile
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context
from mlxflow.workflow.execution import run_stage
from mlxflow.workflow.loader import load_workflow
from tests.small_models import FREE

STEPS = 3

# Clipping, decay, accumulation, dropout, recomputation and the schedule all change these steps
TEXT = """
[pretokenize]
context_length = 16
[train]
num_steps = 3
batch_size = 4
grad_accum_steps = 2
dynamic_batch_size = false
warmup_steps = 1
learning_rate = 1e-2
final_learning_rate = 1e-3
schedule = "linear"
weight_decay = 0.7
max_grad_norm = 0.2
betas = [0.5, 0.9]
checkpointing = 2
log_every = 1
eval_every = 0
max_validation_rows = 4
workers = 2
model = {{ from = "artifacts/train" }}
lora = {{ rank = 2, dropout = 0.3 }}
method = "{method}"
precision = "{precision}"
"""


class Taken(NamedTuple):
    """Steps that were taken.

    Attributes:
        losses: of the steps.
        weights: that were trained, afterwards, by name.
    """

    losses: list[float]
    weights: dict[str, bytes]


def _trained(folder: Path, method: str, model: dict[str, mx.array]) -> dict[str, bytes]:
    """Return the bytes of the weights of a model that an artifact's training changed."""
    file = "model.safetensors" if method == "full" else "adapters/adapters.safetensors"
    saved = cast("dict[str, mx.array]", mx.load(str(folder / file)))
    return {name: _bytes(model[name]) for name in saved}


def _bytes(array: mx.array) -> bytes:
    return np.array(array.astype(mx.float32)).tobytes()  # of bf16 numbers without rounding


def _train(folder: Path, method: str) -> Taken:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    file = "model.safetensors" if method == "full" else "adapters/adapters.safetensors"
    saved = cast("dict[str, mx.array]", mx.load(str(folder / file)))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return Taken(losses, {name: _bytes(array) for name, array in saved.items()})


def _profile(inputs: profile.Inputs, context: Context, made: Path, method: str) -> Taken:
    config, tokens = profile.Config(), TokenFile.open(inputs.tokens)
    model = profile.model_of(config, inputs, context, tokens)
    subject = model.open(profile.settings_of(config, inputs, context))
    with profiled_steps(subject, tokens.rows, seed=model.seed, phases=lambda name: nullcontext()) as steps:
        losses = [float(steps.run()) for _ in range(STEPS)]
    return Taken(losses, _trained(made, method, dict(tree_flatten(subject.model.parameters()))))


def _benchmark(inputs: benchmark.Inputs, context: Context, made: Path, method: str) -> Taken:
    suite = benchmark._suite(benchmark.Config(batch_sizes=(4,)), inputs, context, FREE)
    assert suite is not None
    with suite.open(suite.workflow(4)) as runner:
        losses = runner.run(STEPS)
        return Taken(losses, _trained(made, method, dict(tree_flatten(runner._state[0]))))


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stage order its rows, and draw its adapters, by one seed."""
    for module in ("training.table_job", "stages.profile", "stages.benchmark"):
        monkeypatch.setattr(f"mlxflow.{module}.derive_seed", lambda seed, name: 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_profile_and_benchmark_take_the_steps_of_training(
    project: Path, tmp_path: Path, one_seed: None, method: str, precision: str
) -> None:
    workflow = project / f"{method}-{precision}.toml"
    workflow.write_text(TEXT.format(method=method, precision=precision))
    loaded = load_workflow(workflow)
    made = run_stage(loaded, loaded.find("train"), tmp_path / "made")
    # the model as it was before, with the report of the training
    begin = Path(shutil.copytree(project / "artifacts/train", tmp_path / "begin"))
    shutil.copy(made / "report.toml", begin)
    tokens = project / "artifacts/pretokenize/train.safetensors"
    model = begin / "model.safetensors"
    context = _context(tmp_path)
    wanted = _train(made, method)
    assert len(wanted.losses) == STEPS
    assert _profile(profile.Inputs(model=model, tokens=tokens), context, made, method) == wanted
    assert _benchmark(benchmark.Inputs(model=model, tokens=tokens), context, made, method) == wanted


def _context(root: Path) -> Context:
    given: dict[str, Any] = dict.fromkeys(("state", "folder", "unfinished"), root)
    return Context(
        task="profile",
        seed=0,
        device="cpu",
        memory_limit_bytes=10**9,
        provenance={},
        root=root,
        tasks=(),
        members=(),
        name="tiny",
        digests=ObservedInputs(root / "digests.json"),
        **given,
    )
