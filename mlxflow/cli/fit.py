"""`mlxflow fit`: what fits into the memory, of a profile stage's shapes; or what a training will take."""

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from mlxflow.cli.arguments import add_workflow, read_stage
from mlxflow.messages.advice import advise_build
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.messages.markdown_tables import table_of, write_markdown
from mlxflow.storage import layout, remote_code
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context
from mlxflow.workflow.model import Stage, Workflow
from mlxflow.workflow.stage import rooted

if TYPE_CHECKING:
    from mlxflow.training.forecast import Seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow fit`."""
    parser.add_argument("stage", nargs="?", default="profile", help="a train or profile stage; default: profile")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[], help="default: around the stage's own")
    parser.add_argument("--context-lengths", type=int, nargs="+", default=[], help="default: around the data's own")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Print the table of `fit`."""
    workflow, one = read_stage(parsed)
    fit(workflow, one, batch_sizes=parsed.batch_sizes, context_lengths=parsed.context_lengths)


def fit(workflow: Workflow, stage: Stage, *, batch_sizes: Sequence[int], context_lengths: Sequence[int]) -> None:
    """Print the predicted peak of a training step for each shape, and the largest batch that fits for each length.

    For a train stage, whose model need not be built: the predicted peak of its steps and the seconds to its end.

    Args:
        workflow: the workflow.
        stage: a train stage, or a profile stage whose model and data are measured.
        batch_sizes: rows in one forward pass; empty: from half of the stage's own to eight times as many.
        context_lengths: of the rows; empty: half, the same and twice the data's.

    Raises:
        CallError: it is another stage, or a size is below 1.
        ArtifactError: the model or its data are not built.
    """
    if stage.name not in ("profile", "train"):
        raise CallError(f"{stage.task}: expected a train or profile stage. Name one.")
    if stage.name == "train" and (batch_sizes or context_lengths):
        raise CallError(f"{stage.task}: sizes are tried for a profile stage only. Leave them out.")
    wrong = [number for number in (*batch_sizes, *context_lengths) if number < 1]
    if wrong:
        raise CallError(f"fit: {wrong[0]}: expected a number of at least 1. Use one such as 32.")
    from mlxflow.device import cpu_backend

    if workflow.settings.threads:
        cpu_backend.fix_threads(workflow.settings.threads, key="workflow.threads")
    cpu_backend.prepare()
    inputs = rooted(stage.inputs, workflow.root)
    if stage.name == "train":
        _forecast(workflow, stage, inputs)
        return
    for path in (inputs.config, inputs.model, inputs.tokens):  # type: ignore[attr-defined]
        if not path.exists():
            raise ArtifactError(f"{path}: missing. {advise_build(stage.task)}")
    with remote_code.trusting_code(workflow.trusts_code(stage)):
        _print(workflow, stage, inputs, batch_sizes, context_lengths)


def _forecast(workflow: Workflow, stage: Stage, inputs: Any) -> None:
    """Print what a training will take."""
    from mlxflow.data.token_file import TokenFile
    from mlxflow.device import compute_device, cpu_backend
    from mlxflow.stages import train
    from mlxflow.training.forecast import forecast
    from mlxflow.workflow.execution import limit_memory, observe_inputs

    for path in (inputs.train, inputs.validation, *inputs.tokenizer):
        if not path.exists():
            raise ArtifactError(f"{path}: missing. {advise_build(stage.config.input)}")  # type: ignore[attr-defined]
    chosen = compute_device.select(workflow.settings.device, key="workflow.device")
    if chosen == "cpu":
        cpu_backend.prepare_compiler()
    limit = limit_memory(workflow)
    context = _context(workflow, stage, chosen, limit)
    compute_device.bound_graphs(recomputes=stage.config.checkpointing != "none")  # type: ignore[attr-defined]
    with remote_code.trusting_code(workflow.trusts_code(stage)):
        request, tokens, _, _ = train.table_job(stage.config, inputs, context)  # type: ignore[arg-type]
        validation = TokenFile.open(inputs.validation).rows
        before = time.time() - psutil.Process().create_time()
        expected = forecast(request, tokens, validation, context, before_seconds=before)
    with suppress(ArtifactError):  # of an input that a training alone reads
        observe_inputs(workflow, stage)  # the training that follows need not read large files for their digests
    if expected.peak_bytes is None:
        write_markdown(
            f"{stage.task}: does not fit: a quarter of a pass of {expected.tokens:,} tokens ends in an error. "
            f"{expected.advice}\n"
        )
        return
    fits = expected.least_bytes <= limit
    advice = expected.batch if fits else expected.advice
    waiting = f", {show_bytes(expected.least_bytes)} if the host waits for the device"
    write_markdown(
        f"{stage.task}: {'fits' if fits else 'does not fit'}: {show_bytes(expected.peak_bytes)} in a pass of "
        f"{expected.tokens:,} tokens{waiting if fits and expected.peak_bytes > limit else ''}; "
        f"limit {show_bytes(limit)}\n"
        + (f"{advice}\n" if advice else "")
        + f"{expected.seconds.steps:,} steps: {_described(expected.seconds)}\n"
        + (f"checkpointing: {expected.note}\n" if expected.note else "")
    )


def _described(seconds: "Seconds") -> str:
    """Return the seconds to the end and those of their parts."""
    return (
        f"about {seconds.total:,.1f} seconds to the end: {seconds.start:,.1f} to start, {seconds.opening:,.1f} to open "
        f"the model, as often for the written one, {seconds.choosing:,.1f} to choose kernels and predict the memory, "
        f"{seconds.first_step:,.1f} more for the first step, {seconds.step:,.2f} a step, "
        f"{seconds.validation:,.1f} each of {seconds.validations} validations, "
        f"{seconds.writing:,.1f} to write"
    )


def _print(workflow: Workflow, stage: Stage, inputs: Any, sizes: Sequence[int], lengths: Sequence[int]) -> None:
    from mlxflow.data.token_file import TokenFile
    from mlxflow.device import compute_device, cpu_backend
    from mlxflow.profiling import memory_model
    from mlxflow.stages import profile

    chosen = compute_device.select(workflow.settings.device, key="workflow.device")
    if chosen == "cpu":
        cpu_backend.prepare_compiler()
    limit = compute_device.parse_size(workflow.settings.memory_limit, compute_device.working_set_bytes())
    config: Any = stage.config
    context = _context(workflow, stage, chosen, limit)
    settings = profile.settings_of(config, inputs, context)
    model = profile.model_of(config, inputs, context, TokenFile.open(inputs.tokens))
    size, length = settings.batch_size, model.context_length
    chunk = memory_model.held_chunk(model, settings)
    *points, judge = memory_model.measure_points(
        model, settings, memory_model.shapes_to_measure(size, length, chunk=chunk)
    )
    law = memory_model.fit_law(points, chunk=chunk)
    off = law.peak_bytes(judge.batch_size, judge.context_length) / judge.peaks.whole - 1
    sizes = sizes or [max(1, size // 2), size, 2 * size, 4 * size, 8 * size]
    lengths = lengths or [max(1, length // 2), length, 2 * length]
    titles = ["context_length", *(f"batch {size}" for size in sizes), "largest that fits"]
    peaks = [[law.peak_bytes(size, row_length) for size in sizes] for row_length in lengths]
    unit = _unit_of(peaks)
    rows = [
        [
            str(row_length),
            *(_cell(peak, limit, unit) for peak in row),
            f"{law.largest_batch_size(row_length, limit):,}",
        ]
        for row_length, row in zip(lengths, peaks, strict=True)
    ]
    write_markdown(
        f"peak of a training step in {unit.name}, predicted from {len(points)} measured points; "
        f"limit {show_bytes(limit)}; ! exceeds it\n\n"
        f"{table_of(titles, rows)}\n"
        f"checked at batch {judge.batch_size}, context {judge.context_length}: "
        f"{show_bytes(judge.peaks.whole)} measured, the prediction differs by {off:+.1%}\n"
    )


class _Unit(NamedTuple):
    """The unit of all peaks of a table."""

    name: str
    num_bytes: float
    digits: int


def _unit_of(peaks: Sequence[Sequence[float]]) -> _Unit:
    """Return GB if the smallest peak has two digits in it, so that the peaks of a table can be compared."""
    return _Unit("GB", 1e9, 2) if min(peak for row in peaks for peak in row) >= 0.1e9 else _Unit("MB", 1e6, 1)


def _cell(peak: float, limit: int, unit: _Unit) -> str:
    """Return a peak in a unit, marked where it exceeds the limit."""
    return f"{peak / unit.num_bytes:,.{unit.digits}f}{'' if peak <= limit else ' !'}"


def _context(workflow: Workflow, stage: Stage, chosen: str, limit: int) -> Context:
    return Context(
        task=stage.task,
        seed=workflow.settings.seed,
        device=chosen,
        memory_limit_bytes=limit,
        provenance={},
        root=workflow.root,
        state=workflow.state,
        tasks=tuple(stage.task for stage in workflow.stages),
        members=workflow.members(),
        name=workflow.settings.name,
        folder=Path(),
        unfinished=Path(),
        digests=ObservedInputs(workflow.state / layout.DIGESTS),
    )
