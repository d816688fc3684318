"""Run a training from token files: progress, learning curve, checkpoints, and a clean stop on a signal."""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.device.stop_signals import StopFlag, stop_on_signals
from mlxflow.distributed.code_digest import code_digest
from mlxflow.distributed.team import Team, of_this_process
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_apart
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context
from mlxflow.training import build, progress
from mlxflow.training.batch_size import read_decisions
from mlxflow.training.batches import TrainingData
from mlxflow.training.checkpoints import CheckpointStore
from mlxflow.training.memory_advice import memory_advice
from mlxflow.training.run_state import Result
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.trainer import Session, Stopped


class RunFiles(NamedTuple):
    """The files of a training run.

    Attributes:
        train: the tokens to train on.
        validation: the tokens of validations.
        metrics: gets the learning curve, JSON lines.
        checkpoints: a folder of this run only.
        description: everything that determines the run, by dotted key; checkpoints of other runs differ in it.
        replay: the metrics of a run whose batch sizes are replayed; None to adapt them to the memory.
        rows: to train on instead of all rows of `train`, with the further arrays that the loss takes.
    """

    train: Path
    validation: Path
    metrics: Path
    checkpoints: Path
    description: Mapping[str, Any]
    replay: Path | None = None
    rows: Rows | None = None


def train(
    subject: build.Subject,
    kernels: ModelKernels,
    files: RunFiles,
    *,
    task: str,
    data_seed: int,
    memory_limit_bytes: int,
    if_interrupted: list[Callable[[], None]],
) -> Result:
    """Train a model, from its last checkpoint if there is one.

    Args:
        subject: the model, changed in place, and its settings.
        kernels: in use.
        files: of the run.
        task: name of the stage, for the progress.
        data_seed: of the order of the rows.
        memory_limit_bytes: of MLX.
        if_interrupted: gets a function that saves a checkpoint of the last step, for a signal before the model is
            written.

    Raises:
        SystemExit: SIGINT or SIGTERM ended the run; a checkpoint is saved. Or this is a rank of a distributed run that
            has no more to do after the training: rank 0 writes the model.
        StageError: the loss stays without a finite value.
        UserError: no batch fits into the memory.
    """
    settings, table, team = subject.settings, subject.names.table, of_this_process()
    say = terminal.say if team.rank.is_first else _say_nothing
    checkpoints, data = _store(files, settings, team, say), _open_data(files, settings, data_seed)
    replay = read_decisions(files.replay, subject.names.of("replay")) if files.replay else ()
    with (
        progress.show_progress(task, num_steps=settings.num_steps, is_silent=not team.rank.is_first) as show,
        files.metrics.open("w") as metrics,
        stop_on_signals() as stop_requested,
    ):

        def log(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            show(record)

        shared = _shared(files, settings, team)
        session = Session(checkpoints, memory_limit_bytes, log, stop_requested, team, shared, progress.steps_to(show))
        with build.ready_trainer(subject, kernels, data, session, replay=replay) as trainer:
            checkpoint = checkpoints.latest(trainer.unfit)
            if checkpoint is not None:
                say(f"{table}: resumes from step {checkpoint.facts['step']} ({checkpoint.folder})")
                metrics.write(checkpoint.metrics)
            try:
                result = trainer.run(checkpoint)
            except Stopped as stopped:
                say(f"{table}: {_describe_stop(stopped)}")
                raise SystemExit(128 + (stop_requested.signal or signal.SIGTERM)) from stopped
            if team.rank.is_first and (save := trainer.save_last):
                if_interrupted.append(lambda: say(f"{table}: {_describe_stop(Stopped(result.steps, save()))}"))
    _end_process(team, stop_requested)
    terminal.say(*exceeded_lines(result, subject))
    return result


def exceeded_lines(result: Result, subject: build.Subject) -> list[str]:
    """Return a line about a peak above the memory limit; none if the limit was kept.

    Args:
        result: of the training.
        subject: what was trained.
    """
    peak, limit, settings = result.peak_memory_bytes, result.memory_limit_bytes, subject.settings
    if peak <= limit:
        return []
    advice = memory_advice(settings, subject.names, rows=settings.batch_size)
    taken, allowed = show_apart(peak, limit)
    return [f"{subject.names.table}: training took up to {taken}, more than the {allowed} allowed. {advice}"]


def _end_process(team: Team, stop_requested: StopFlag) -> None:
    """End a rank that is done, and a process that got a signal after the last check of the training.

    Raises:
        SystemExit: this is such a process.
    """
    if not team.rank.is_first:
        raise SystemExit(0)
    if stop_requested():
        raise SystemExit(128 + stop_requested.signal)


def _open_data(files: RunFiles, settings: TrainingSettings, seed: int) -> TrainingData:
    tokens, validation = TokenFile.open(files.train), TokenFile.open(files.validation).rows
    if files.rows is not None:
        return build.make_data(files.rows, validation, settings, seed=seed)
    return build.make_data(tokens.rows, validation, settings, seed=seed, name_rows=tokens.name_rows)


def _say_nothing(line: str) -> None:
    """Print nothing: rank 0 prints for all."""


def _describe_stop(stopped: Stopped) -> str:
    return f"stopped after step {stopped.step}; {stopped.checkpoint} lets the next run resume from there"


def _store(files: RunFiles, settings: TrainingSettings, team: Team, say: Callable[[str], None]) -> CheckpointStore:
    """Return the checkpoints of a run, which only rank 0 writes."""
    kept, is_read_only = settings.keep_checkpoints, not team.rank.is_first
    return CheckpointStore(files.checkpoints, keep=kept, settings=files.description, say=say, is_read_only=is_read_only)


def _shared(files: RunFiles, settings: TrainingSettings, team: Team) -> dict[str, str]:
    """Return digests of what the ranks of a distributed run must share, by its name in words."""
    if team.size == 1:
        return {}
    described = {"description": dict(files.description), "settings": settings.table()}
    return {"code": code_digest(), "tokens": str(files.description["inputs"]), "settings": digest_json(described)}


def describe(
    table: Mapping[str, Any], names: SettingNames, context: Context, *, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return everything that determines a training run, as a flat mapping by dotted key, for `RunFiles.description`.

    Args:
        table: of the workflow, as TOML values.
        names: of its keys.
        context: of the stage.
        without: keys that do not change the result.
    """
    described = dict(_flat({name: value for name, value in table.items() if name not in without}, names.table))
    provenance = context.provenance
    return described | {"seed": context.seed, "mlx": provenance["mlx"], "inputs": provenance["inputs_digest"]}


def _flat(table: Mapping[str, Any], key: str) -> Any:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", value
