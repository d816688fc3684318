"""The figures of a benchmark stage, as report.toml holds them; `low_` and `high_` are the ends of an interval."""

from mlxflow.stage_reports.benchmark_rows import ModelRow, TrainingRow
from mlxflow.storage.report_structs import Count, ReportTable, Seconds, Share, StageReport


class DeviceFacts(ReportTable, frozen=True, kw_only=True):
    """The device that was measured.

    Attributes:
        kind: "gpu" or "cpu".
        name: of the device.
        processor: of the host.
    """

    kind: str
    name: str
    processor: str


class DriftFigures(ReportTable, frozen=True, kw_only=True):
    """The first row timed again at the end.

    Attributes:
        name: of the row.
        batch_size: of the row.
        ratio: its step's time at the end by that at the beginning.
        is_noticed: whether the difference is more than noise.
    """

    name: str
    batch_size: Count
    ratio: float
    is_noticed: bool


class ConvergenceCurve(ReportTable, frozen=True, kw_only=True):
    """The loss of a new model.

    Attributes:
        name: "baseline" or "workflow".
        steps: updates, by point.
        tokens: learned from until then, by point.
        seconds: of training until then, by point.
        loss: mean since the point before, in nats per token, by point.
        same_loss: lowest loss that every curve reached.
        tokens_to_loss: learned from until `same_loss`.
        seconds_to_loss: of training until `same_loss`.
    """

    name: str
    steps: tuple[Count, ...]
    tokens: tuple[Count, ...]
    seconds: tuple[Seconds, ...]
    loss: tuple[float, ...]
    same_loss: float
    tokens_to_loss: Count
    seconds_to_loss: Seconds


class BottleneckFigures(ReportTable, frozen=True, kw_only=True):
    """Where the time of a step goes, and what the device can do; None for what did not fit into the memory.

    Attributes:
        data_share: waiting for batches.
        graph_share: building the graph on the host.
        compute_share: computing.
        synchronize_share: waiting for the last results.
        ceiling_flops_per_second: that the device was measured to do.
        ceiling_bytes_per_second: that the device was measured to read.
        flops_per_second: of training.
        decode_bytes_per_second: read by decoding with the dense model.
        advice: the change most worth making.
    """

    data_share: Share | None = None
    graph_share: Share | None = None
    compute_share: Share | None = None
    synchronize_share: Share | None = None
    ceiling_flops_per_second: float | None = None
    ceiling_bytes_per_second: float | None = None
    flops_per_second: float | None = None
    decode_bytes_per_second: float | None = None
    advice: str | None = None


class PromiseFigures(ReportTable, frozen=True, kw_only=True):
    """A promise beside what was measured.

    Attributes:
        promise: in words.
        holds: whether it holds.
        measured: the figure; None where it could not be measured.
        low: least that the figure may be.
        high: most that the figure may be.
        figure: in words.
    """

    promise: str
    holds: bool
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    figure: str | None = None


class ComparisonFigures(ReportTable, frozen=True, kw_only=True):
    """The run beside the baseline's.

    Attributes:
        baseline: the report, as the workflow names it.
        compared: whether it was measured on the same device.
        figures: compared.
        repetitions: of what looked worse.
        noise_between_runs: what looked worse in one run alone, a line each.
    """

    baseline: str
    compared: bool
    figures: Count | None = None
    repetitions: Count | None = None
    noise_between_runs: tuple[str, ...] | None = None


class BenchmarkReport(StageReport, frozen=True, kw_only=True):
    """The figures of a benchmark stage.

    Attributes:
        version: VERSION of the stage.
        device: that was measured.
        training: ways of training, by batch size.
        drift: of the device's speed; None where nothing could be timed.
        convergence: of new models; None where it was not asked for.
        models: by stage.
        bottleneck: of a step.
        promises: by name.
        lowered: what was measured less than asked for, a line each.
        comparison: with the baseline; None without one.
    """

    version: Count
    device: DeviceFacts
    training: tuple[TrainingRow, ...]
    drift: DriftFigures | None = None
    convergence: tuple[ConvergenceCurve, ...] | None = None
    models: tuple[ModelRow, ...]
    bottleneck: BottleneckFigures
    promises: dict[str, PromiseFigures]
    lowered: tuple[str, ...] | None = None
    comparison: ComparisonFigures | None = None
