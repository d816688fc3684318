"""Memory of training steps: measured under a profiler, or predicted for other settings from small trials.

The peak of a step is the larger of the peak of the forward and backward pass, which grows with the tokens, and that of
the update, which does not. A trial measures both with a part of the rows. The first is linear in the rows (with
`linear_cross_entropy`'s chunk reduced by the same factor), so two trials predict any other number of rows.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import Rows
from mlxflow.profiling.peak_breakdown import compose
from mlxflow.profiling.profiled_step import ProfiledSteps, logits_bytes, profiled_steps
from mlxflow.profiling.profiler import MemoryProfiler, profile_memory
from mlxflow.report.stage_reports.profile import PeakParts
from mlxflow.training import build, starting_model
from mlxflow.training.settings import SettingNames, TrainingSettings

#: Steps of a trial: the first creates the optimizer's state, and the reuse of buffers varies by chance.
_TRIAL_STEPS = 4
#: The most trials until one during which no other memory was allocated or freed.
_MOST_TRIALS = 4

STEP = "training_step"
PASS = f"{STEP}/forward_backward"
UPDATE = f"{STEP}/update"


class ProfiledModel(NamedTuple):
    """A model that is trained under a profiler.

    Attributes:
        folder: a model folder; its model is dense unless adapters are trained.
        key: the setting that names it, for messages.
        vocab_size: V.
        context_length: of the rows, L.
        seed: of the order of the rows.
        names: of the settings of its training, for messages.
    """

    folder: Path
    key: str
    vocab_size: int
    context_length: int
    seed: int
    names: SettingNames = SettingNames()

    def open(self, settings: TrainingSettings) -> build.Subject:
        """Load the model and prepare it for training.

        Raises:
            ArtifactError: it cannot be opened, or is quantized and all weights are trained.
        """
        model = starting_model.open_for_steps(self.folder, settings, key=self.key)
        build.prepare_model(model, settings, adapter_seed=self.seed, names=self.names)
        return build.Subject(model, settings, self.vocab_size, self.context_length, self.names)


class Peaks(NamedTuple):
    """The peaks of the parts of a step in bytes, above the memory in use before the model was loaded."""

    forward_backward: float
    update: float

    @property
    def whole(self) -> float:
        """The peak of the whole step."""
        return max(self)


class ProfiledRun(NamedTuple):
    """The memory of the steps under a profiler.

    Attributes:
        model_bytes: size of the parameters.
        peaks: of the steps.
        composition: parts of the highest peak; see `compose`.
    """

    model_bytes: int
    peaks: Peaks
    composition: PeakParts


def take_steps(
    model: ProfiledModel, rows: Rows, settings: TrainingSettings, profiler: MemoryProfiler, *, num_steps: int
) -> ProfiledRun:
    """Train a model under a profiler.

    Args:
        model: the model to train.
        rows: at least as many as one step takes.
        settings: of the training.
        profiler: records the phases "load_model", "first_step" and "training_step", and the ends of steps.
        num_steps: steps to measure, after the first one.
    """
    before = mx.get_active_memory()
    with profile_memory(profiler, "load_model"):
        subject = model.open(settings)
    model_bytes = starting_model.num_bytes(subject.model)
    with _steps(subject, rows, profiler, seed=model.seed) as steps:
        with profile_memory(profiler, "first_step"):
            steps.run()  # compiles, and creates the optimizer's state
        profiler.begin_steps()
        for _ in range(num_steps):
            with profile_memory(profiler, STEP):
                steps.run()
            profiler.end_step()
        composition = _compose(subject, profiler, steps)
    return ProfiledRun(model_bytes, _peaks(profiler, before), composition)


def _peaks(profiler: MemoryProfiler, before: int) -> Peaks:
    totals = profiler.totals
    return Peaks(totals[PASS].peak_memory_bytes - before, totals[UPDATE].peak_memory_bytes - before)


def _steps(
    subject: build.Subject, rows: Rows, profiler: MemoryProfiler, *, seed: int, chunk_share: float = 1.0
) -> AbstractContextManager[ProfiledSteps]:
    return profiled_steps(
        subject, rows, seed=seed, phases=lambda name: profile_memory(profiler, name), chunk_share=chunk_share
    )


def _compose(subject: build.Subject, profiler: MemoryProfiler, steps: ProfiledSteps) -> PeakParts:
    totals, highest = profiler.totals, profiler.highest  # read before the next lines allocate memory
    logits = logits_bytes(subject)
    shares_memory = mx.default_device() == mx.cpu or mx.metal.is_available()  # else only the GPU holds the arrays
    return compose(
        steps.tree_bytes(),
        logits_bytes=logits,
        peak_memory_bytes=int(profiler.timeline()["peak_memory_bytes"].max()),
        reserved_bytes=highest.reserved_bytes,
        process_bytes=highest.process_bytes if shares_memory else 0,
        lies_in_update=totals[UPDATE].peak_memory_bytes > totals[PASS].peak_memory_bytes,
    )


def blank_rows(count: int, context_length: int) -> Rows:
    """Return rows of one repeated token, all of it targets: memory does not depend on the tokens."""
    shape = (count, context_length + 1)
    return Rows(np.ones(shape, np.uint16), np.full(shape, 3, np.uint8))


def trial(model: ProfiledModel, settings: TrainingSettings, chunk_share: float = 1.0) -> Peaks:
    """Run a few steps and return their peaks; all memory is freed afterwards.

    A trial during which other threads allocated or freed memory is repeated.

    Args:
        model: the model to train.
        settings: of the training.
        chunk_share: see `objective.make_objective`.

    Raises:
        RuntimeError: out of memory.
    """
    before = _idle_bytes()
    for _ in range(_MOST_TRIALS):
        peaks = _try_steps(model, settings, before, chunk_share)
        after = _idle_bytes()
        if after == before:
            break
        before = after
    return peaks


def _idle_bytes() -> int:
    """Return MLX's active memory in bytes after garbage collection."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def _try_steps(model: ProfiledModel, settings: TrainingSettings, before: int, chunk_share: float) -> Peaks:
    profiler = MemoryProfiler()
    try:
        rows = blank_rows(settings.rows_per_step, model.context_length)
        with _steps(model.open(settings), rows, profiler, seed=model.seed, chunk_share=chunk_share) as steps:
            steps.run()
            profiler.totals.clear()
            for _ in range(_TRIAL_STEPS):
                with profile_memory(profiler, STEP):
                    steps.run()
        return _peaks(profiler, before)
    finally:
        profiler.close()


def predict(
    model: ProfiledModel,
    settings: TrainingSettings,
    trials: Callable[[ProfiledModel, TrainingSettings, float], Peaks] = trial,
) -> Peaks:
    """Predict the peaks of a step from two trials with a quarter and a half of its rows.

    Args:
        model: the model to train.
        settings: of the training.
        trials: runs a trial; its last argument is the share of the fused loss's chunk.
    """
    rows = settings.batch_size
    few, more = max(1, rows // 4), max(2, rows // 2)
    near, far = (trials(model, settings.replace(batch_size=size), size / rows) for size in (few, more))
    further = (rows - more) / (more - few)
    return Peaks(*(large + (large - small) * further for small, large in zip(near, far, strict=True)))
