"""The memory of training steps measured, and that of other settings and shapes predicted from small trials.

The peak of a step is the larger of two: that of the forward and backward pass, which grows with the tokens, and that
of the update, which does not. A trial measures both with a part of the rows; the first is a straight line over the
rows (with `linear_cross_entropy`'s chunk made smaller by the same factor), so two trials tell any other number.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.data.token_file import Rows
from mlxflow.models import model_folder
from mlxflow.profiling.peak_breakdown import compose
from mlxflow.profiling.profiled_step import MeasuredSteps, Settings, logits_bytes, measured_steps
from mlxflow.profiling.profiler import MemoryProfiler, profile_memory
from mlxflow.training import adapters

#: Steps of a trial: the first makes the optimizer's state, and how far buffers are reused is chance.
_TRIAL_STEPS = 4
#: Trials until one in which nobody else's memory came or went.
_MOST_TRIALS = 4

STEP = "training_step"
PASS = f"{STEP}/forward_backward"
UPDATE = f"{STEP}/update"


class Job(NamedTuple):
    """Which model is trained on what.

    Attributes:
        folder: a model folder; its model is dense, or adapters are trained beside it.
        key: the setting that names it, for messages.
        adapters: what is trained instead of all weights, or None.
        vocab_size: V.
        context_length: of the rows, L.
        masks_documents: no token attends to another document in its row.
        seed: of the order of the rows.
    """

    folder: Path
    key: str
    adapters: adapters.AdapterShape | None
    vocab_size: int
    context_length: int
    masks_documents: bool
    seed: int

    def open(self) -> nn.Module:
        """Return the model, ready to be trained.

        Raises:
            ArtifactError: it is none, or quantized.
        """
        model = model_folder.load_for_steps(self.folder, self.key, trains_adapters=self.adapters is not None)
        if self.adapters is not None:
            adapters.ensure_adapters(model, self.adapters, seed=self.seed, key=self.key)
        mx.eval(model.parameters())
        return model


class Peaks(NamedTuple):
    """The peaks of a step in bytes, above what was in memory before the model was."""

    forward_backward: float
    update: float

    @property
    def whole(self) -> float:
        """The step's."""
        return max(self)


class Measured(NamedTuple):
    """What the steps under a profiler came to.

    Attributes:
        model_bytes: of the parameters.
        peaks: of the steps.
        composition: of the highest peak; see `compose`.
    """

    model_bytes: int
    peaks: Peaks
    composition: dict[str, int]


def take_steps(job: Job, rows: Rows, settings: Settings, profiler: MemoryProfiler, *, num_steps: int) -> Measured:
    """Train a model under a profiler.

    Args:
        job: the model.
        rows: at least one step's of them.
        settings: of the step.
        profiler: gets the phases "load_model", "first_step" and "training_step", and the steps' ends.
        num_steps: measured, after the first one.
    """
    before = mx.get_active_memory()
    with profile_memory(profiler, "load_model"):
        model = job.open()
    model_bytes = model_folder.num_bytes(model)
    with _steps(job, model, rows, settings, profiler) as steps:
        with profile_memory(profiler, "first_step"):
            steps.run()  # compiles, and makes the optimizer's state
        profiler.begin_steps()
        for _ in range(num_steps):
            with profile_memory(profiler, STEP):
                steps.run()
            profiler.end_step()
        composition = _compose(job, model, settings, profiler, steps)
    return Measured(model_bytes, _peaks(profiler, before), composition)


def _peaks(profiler: MemoryProfiler, before: int) -> Peaks:
    totals = profiler.totals
    return Peaks(totals[PASS].peak_memory_bytes - before, totals[UPDATE].peak_memory_bytes - before)


def _steps(
    job: Job, model: nn.Module, rows: Rows, settings: Settings, profiler: MemoryProfiler
) -> AbstractContextManager[MeasuredSteps]:
    return measured_steps(
        model,
        rows,
        settings,
        vocab_size=job.vocab_size,
        masks_documents=job.masks_documents,
        seed=job.seed,
        phases=lambda name: profile_memory(profiler, name),
    )


def _compose(
    job: Job, model: nn.Module, settings: Settings, profiler: MemoryProfiler, steps: MeasuredSteps
) -> dict[str, int]:
    totals, highest = profiler.totals, profiler.highest  # before what follows takes memory of its own
    logits = logits_bytes(model, settings, vocab_size=job.vocab_size, context_length=job.context_length)
    shares_memory = mx.default_device() == mx.cpu or mx.metal.is_available()  # else the arrays lie on the GPU alone
    return compose(
        steps.tree_bytes(job.context_length) | {"logits_bytes": logits},
        peak_memory_bytes=int(profiler.timeline()["peak_memory_bytes"].max()),
        reserved_bytes=highest.reserved_bytes,
        process_bytes=highest.process_bytes if shares_memory else 0,
        lies_in_update=totals[UPDATE].peak_memory_bytes > totals[PASS].peak_memory_bytes,
    )


def blank_rows(count: int, context_length: int) -> Rows:
    """Return rows of one token, all of it trained on: memory does not depend on what is read."""
    shape = (count, context_length + 1)
    return Rows(np.ones(shape, np.uint16), np.full(shape, 3, np.uint8))


def trial(job: Job, settings: Settings) -> Peaks:
    """Run a few steps and return their peaks; nothing is left in memory.

    A trial in which what lay in memory beside it changed (another thread gave something back) is taken again.

    Raises:
        RuntimeError: MLX found no memory.
    """
    before = _idle_bytes()
    for _ in range(_MOST_TRIALS):
        peaks = _try_steps(job, settings, before)
        after = _idle_bytes()
        if after == before:
            break
        before = after
    return peaks


def _idle_bytes() -> int:
    """Return MLX's active memory with all given back that is dead."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def _try_steps(job: Job, settings: Settings, before: int) -> Peaks:
    profiler = MemoryProfiler()
    try:
        rows = blank_rows(settings.batch_size * settings.grad_accum_steps, job.context_length)
        with _steps(job, job.open(), rows, settings, profiler) as steps:
            steps.run()
            profiler.totals.clear()
            for _ in range(_TRIAL_STEPS):
                with profile_memory(profiler, STEP):
                    steps.run()
        return _peaks(profiler, before)
    finally:
        profiler.close()


def predict(job: Job, settings: Settings, trials: Callable[[Job, Settings], Peaks] = trial) -> Peaks:
    """Return the peaks that a step would have, from two trials with a quarter and a half of its rows.

    Args:
        job: the model.
        settings: of the step.
        trials: runs one.
    """
    rows = settings.batch_size
    few, more = max(1, rows // 4), max(2, rows // 2)
    one, other = (
        trials(job, settings._replace(batch_size=size, chunk_share=settings.chunk_share * size / rows))
        for size in (few, more)
    )
    further = (rows - more) / (more - few)
    return Peaks(*(far + (far - near) * further for near, far in zip(one, other, strict=True)))
