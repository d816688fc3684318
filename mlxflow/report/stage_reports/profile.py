"""The figures of a profile stage in report.toml; all sizes in bytes."""

from typing import Literal

from mlxflow.storage.report_structs import Count, ReportTable, Seconds, StageReport
from mlxflow.training.settings import TrainingSettings


class PhaseFigures(ReportTable, frozen=True, kw_only=True):
    """All passes through a phase.

    Attributes:
        name: such as "training_step/update".
        calls: passes.
        seconds: wall clock of all of them.
        peak_memory_bytes: highest memory of MLX's arrays in one.
        growth_bytes: their total growth; negative if they shrank.
    """

    name: str
    calls: Count
    seconds: Seconds
    peak_memory_bytes: Count
    growth_bytes: int


class PeakFigures(ReportTable, frozen=True, kw_only=True):
    """The peak of a step.

    Attributes:
        bytes: memory of MLX's arrays.
        step: from 1.
        phase: innermost phase; empty for none.
    """

    bytes: Count
    step: Count
    phase: str


class PeakParts(ReportTable, frozen=True, kw_only=True):
    """The parts of the peak, which add up to `total_bytes`; see `peak_breakdown.compose`."""

    weights_bytes: Count
    optimizer_bytes: Count
    data_bytes: Count
    logits_bytes: Count
    gradients_bytes: Count
    activations_bytes: Count
    update_bytes: Count
    cache_bytes: Count
    other_bytes: Count
    total_bytes: Count


class SuggestionFigures(ReportTable, frozen=True, kw_only=True):
    """A setting to change.

    Attributes:
        key: of the workflow, such as "train.batch_size".
        value: to set it to.
        saves_bytes: predicted reduction of the process's peak.
        evidence: the measurement behind it.
    """

    key: str
    value: bool | int | float | str
    saves_bytes: int
    evidence: str


class LeakFigures(ReportTable, frozen=True, kw_only=True):
    """Whether a series of readings grows without end; see `leak_test.find_leak`.

    Attributes:
        verdict: "leak", "bounded growth" (it grew and stopped) or "none".
        bytes_per_step: growth of a leak, else 0.
        steps_until_limit: from the last step until the memory limit is reached; None without a leak.
        note: why there is no verdict; None if there is one.
    """

    verdict: Literal["leak", "bounded growth", "none"]
    bytes_per_step: float
    steps_until_limit: Count | None = None
    note: str | None = None


class LeakReport(LeakFigures, frozen=True, kw_only=True):
    """The leak test of MLX's arrays.

    Attributes:
        reserved: of arrays and MLX's cache together.
        process: of the resident memory of the process.
    """

    reserved: LeakFigures
    process: LeakFigures


class TrendFigures(ReportTable, frozen=True, kw_only=True):
    """Growth of each reading in bytes per step; negative if it falls."""

    active_memory_bytes_per_step: float
    peak_memory_bytes_per_step: float
    cache_memory_bytes_per_step: float
    rss_bytes_per_step: float
    available_bytes_per_step: float


class ProfileRun(ReportTable, frozen=True, kw_only=True):
    """The stage's own keys of the table `run`.

    Attributes:
        mlx_device_info: of MLX, values as text.
    """

    mlx_device_info: dict[str, str]


class ProfileReport(StageReport, frozen=True, kw_only=True):
    """The figures of a profile stage.

    Attributes:
        batch_size: rows in a forward pass.
        num_steps: profiled.
        settings: of the steps.
        memory_limit_bytes: of MLX's arrays.
        cache_limit_bytes: of MLX's freed buffers.
        active_memory_bytes: of MLX's arrays after the last step.
        peak_memory_bytes: highest memory of MLX's arrays.
        cache_memory_bytes: highest size of MLX's freed buffers.
        rss_before_bytes: resident memory of the process before the model was loaded.
        rss_bytes: highest resident memory of the process.
        footprint_bytes: highest footprint of the process.
        available_bytes: lowest available memory of the system.
        device_bytes: highest memory in use of the device; 0 if it has no memory of its own.
        median_step_seconds: of a step.
        phases: in the order of their first end.
        peaks: the highest steps' peaks, the highest first.
        model_bytes: of the model's weights.
        composition: parts of the peak.
        suggestions: settings that would save memory, largest saving first; None if not requested.
        leak: whether memory leaks.
        trend: growth of each reading.
        run: the stage's own keys.
    """

    batch_size: Count
    num_steps: Count
    settings: TrainingSettings
    memory_limit_bytes: Count
    cache_limit_bytes: Count
    active_memory_bytes: Count
    peak_memory_bytes: Count
    cache_memory_bytes: Count
    rss_before_bytes: Count
    rss_bytes: Count
    footprint_bytes: Count
    available_bytes: Count
    device_bytes: Count
    median_step_seconds: Seconds
    phases: tuple[PhaseFigures, ...]
    peaks: tuple[PeakFigures, ...]
    model_bytes: Count
    composition: PeakParts
    suggestions: tuple[SuggestionFigures, ...] | None = None
    leak: LeakReport
    trend: TrendFigures
    run: ProfileRun
