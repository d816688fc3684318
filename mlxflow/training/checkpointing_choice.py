"""`checkpointing = "auto"`: as few layers as possible are recomputed within the memory limit, found by trials.

Recomputing a layer costs a forward pass of it and saves all of its activations but its input. What the activations of
all layers take is measured on a part of the rows, with every layer recomputed and with none; settings that should fit
are then tried with all rows, the fastest first.
"""

import json
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlxflow.data.token_file import Rows
from mlxflow.distributed.team import of_this_process
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.storage import atomic_folders, layout, report_structs, state_files
from mlxflow.training import build, starting_model
from mlxflow.training.settings import Recomputation
from mlxflow.training.step_trials import StepTrial, part_of, try_step

#: The fastest first: none, one of four, every other, all, all in pairs.
CANDIDATES = (Recomputation(0), Recomputation(4), Recomputation(2), Recomputation(1), Recomputation(1, 2))

# The part of the rows with which activations are measured: one of so many tokens
_PART = 4


class CheckpointingChoice(NamedTuple):
    """The chosen setting.

    Attributes:
        layers: that are recomputed.
        line: what was measured, for the user.
    """

    layers: Recomputation
    line: str


def choose_checkpointing(
    subject: build.Subject, kernels: ModelKernels, rows: Rows, *, limit_bytes: int
) -> CheckpointingChoice:
    """Try gradient checkpointing on the rows of a pass and return the fastest setting within a limit.

    Of a dynamic batch the limit counts up to the share above which it would shrink. If nothing fits, all layers are
    recomputed, in pairs.

    Args:
        subject: the model and its settings.
        kernels: in use.
        rows: of one pass.
        limit_bytes: memory limit of MLX.
    """

    def trial(layers: Recomputation, some: Rows) -> StepTrial | None:
        return try_step(subject._replace(settings=layers.applied_to(subject.settings)), kernels, some)

    shrinks = subject.settings.dynamic_batch_size and subject.settings.shrink_above < 1
    allowed = int(limit_bytes * (subject.settings.shrink_above if shrinks else 1.0))
    bound = f"{show_bytes(allowed)} {'above which the batch shrinks' if shrinks else 'allowed'}"
    part = part_of(rows, _PART)
    small = {every: measured for every in (1, 0) if (measured := trial(Recomputation(every), part)) is not None}
    if len(small) < 2:
        return CheckpointingChoice(
            Recomputation(1, 2), "every layer is recomputed, in pairs: a part of the rows fills the memory"
        )
    weights = starting_model.num_bytes(subject.model)
    tokens = rows.num_rows * (rows.tokens.shape[1] - 1)

    def expected(every: int) -> float:
        """Return the peak of a pass over all rows, in bytes: those of the part scaled by the tokens."""
        share = 1.0 if every == 0 else 1 - 1 / every
        peak: float = small[1].peak_bytes * (1 - share) + small[0].peak_bytes * share
        return float(weights + max(0.0, peak - weights) * tokens / small[1].tokens)

    for layers in CANDIDATES:
        measured = trial(layers, rows) if layers.every == 1 or expected(layers.every) <= allowed else None
        if measured is not None and measured.peak_bytes <= allowed:
            return CheckpointingChoice(layers, _describe(layers, measured, expected(0), bound))
    line = f"every layer is recomputed, in pairs, and exceeds the {bound}"
    return CheckpointingChoice(Recomputation(1, 2), line)


def _describe(layers: Recomputation, measured: StepTrial, everything: float, bound: str) -> str:
    seconds = measured.seconds + measured.update_seconds  # a pass of a tiny model may take no time beside its update
    speed = f"{measured.tokens / seconds:,.0f} tokens/s with a peak of {show_bytes(measured.peak_bytes)}"
    rest = f"; to keep all activations takes about {show_bytes(everything)}" if layers.every else ""
    return f"{layers.words}: {speed}, of {bound}{rest}"


class _ReportedSettings(msgspec.Struct, frozen=True):
    """The setting in the table `settings` of a report."""

    checkpoint_every: int = 0
    checkpoint_segment: int = 1


class _Reported(msgspec.Struct, frozen=True):
    settings: _ReportedSettings | None = None


def resolve_checkpointing(
    subject: build.Subject,
    kernels: ModelKernels,
    rows: Rows,
    *,
    limit_bytes: int,
    memory_file: Path,
    published: Path | None,
) -> Recomputation:
    """Return the layers of the run that is continued or repeated; for a new run, those of `choose_checkpointing`.

    In a distributed run rank 0 chooses for all.

    Args:
        subject: see `choose_checkpointing`.
        kernels: see there.
        rows: see there.
        limit_bytes: see there.
        memory_file: keeps the choice until the run ends.
        published: the artifact that the run repeats; None for a new one.

    Raises:
        ArtifactError: the report of the artifact that is repeated is missing or damaged.
    """
    if published is not None:
        reported = report_structs.read_part(
            published / layout.REPORT, _Reported, advice="Remove it and build it again."
        ).settings
        if reported is not None:
            return Recomputation(reported.checkpoint_every, reported.checkpoint_segment)
    team = of_this_process()
    found = _remembered(memory_file)
    if found is None and team.rank.is_first:
        choice = choose_checkpointing(subject, kernels, rows, limit_bytes=limit_bytes)
        terminal.say(f'{subject.names.of("checkpointing")} = "auto": {choice.line}')
        found = choice.layers
        memory_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_folders.write_whole(memory_file, json.dumps(found).encode())
    every, segment = team.exchange("gradient checkpointing", found or (0, 0))[0]
    return Recomputation(int(every), int(segment))


def _remembered(file: Path) -> Recomputation | None:
    try:
        layers = msgspec.json.decode(state_files.read_bytes(file), type=Recomputation)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    return layers if layers.every >= 0 and layers.segment >= 1 else None
