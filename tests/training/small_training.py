"""A small training run: its model, rows, trainer and checkpoint store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.training import build
from mlxflow.training.batch_size import BatchSizes, Decision
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.objective import plain_objective
from mlxflow.training.run_state import Result
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.step import Step
from mlxflow.training.trainer import Session, Trainer
from mlxflow.training.update import Update
from tests.small_models import llama

GB = 10**9
Records = list[dict[str, Any]]


ROOM: dict[str, Path] = {}


def small_model() -> nn.Module:
    return llama()[0]


def small_rows(count: int = 40, length: int = 9) -> Rows:
    """Return rows, each with another number of targets."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, (count, length)).astype(np.uint16)
    marks = np.where(np.arange(length) <= generator.integers(2, length, (count, 1)), 3, 2).astype(np.uint8)
    return Rows(tokens, marks)


def padded_rows(count: int = 40, length: int = 97) -> Rows:
    """Return rows of which most end long before their last position."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, (count, length)).astype(np.uint16)
    ends = np.where(generator.random(count) < 0.05, length, generator.integers(2, 50, count))
    marks = np.where(np.arange(length) < ends[:, None], 3, 0).astype(np.uint8)
    return Rows(np.where(marks, tokens, 0).astype(np.uint16), marks)


def make_trainer(
    log: Callable[[dict[str, Any]], None],
    *,
    model: nn.Module | None = None,
    rows: Rows | None = None,
    store: CheckpointStore | None = None,
    asked: Callable[[], bool] = lambda: False,
    replay: list[Decision] | None = None,
    learning_rate: float | Callable[[mx.array], mx.array] = 1e-2,
    accum: int = 2,
    constant: bool = True,
    batch_size: int = 8,
    limit: int = GB,
    optimizer: optim.Optimizer | None = None,
    **changes: Any,
) -> Trainer:
    model = model or small_model()
    rows = rows or small_rows()
    model.train()
    update = Update(model, optimizer or optim.AdamW(learning_rate), max_grad_norm=1.0, has_masters=False)
    settings = TrainingSettings(
        batch_size=batch_size,
        max_batch_size=2 * batch_size,
        grad_accum_steps=accum,
        constant_tokens_per_step=constant,
        num_steps=6,
        lazy_eval_every=2,
        log_every=2,
        eval_every=0,
        max_validation_rows=6,
        adjust_every=1,
        save_every=0,
        max_bad_steps=3,
        workers=2,
        prefetch_batches=2,
    ).replace(**changes)
    names = SettingNames("train", "pretokenize.context_length", "workflow.memory_limit")
    return Trainer(
        model,
        Step(model, update, plain_objective(masks_documents=False)),
        settings,
        sizes=BatchSizes(settings, replay=replay or (), names=names),
        data=build.make_data(rows, rows, settings, seed=0),
        session=Session(store or checkpoint_store(ROOM["folder"]), limit, log, asked),
        names=names,
    )


def train_small(**settings: Any) -> tuple[Result, Records, dict[str, bytes]]:
    records: Records = []
    model = settings.pop("model", None) or small_model()
    result = make_trainer(records.append, model=model, **settings).run()
    return result, records, bytes_of(model)


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in tree_flatten(model.parameters())}


def records_of(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def checkpoint_store(folder: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(folder / "own", keep=2, settings=settings or {"train.num_steps": 6}, say=lambda line: None)
