"""The figures of a benchmark stage in report.toml; `low_` and `high_` are the ends of an interval."""

from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow
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
        ratio: its step time at the end divided by that at the beginning.
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
    """Shares of a step's time, and ceilings of the device; None for figures that did not fit into the memory.

    Attributes:
        data_share: waiting for batches.
        graph_share: building the graph on the host.
        compute_share: computing.
        synchronize_share: waiting for the last results.
        ceiling_flops_per_second: measured maximum of the device.
        ceiling_bytes_per_second: measured maximum of the device.
        flops_per_second: of training.
        decode_bytes_per_second: read by decoding with the dense model.
        advice: the most promising change of a setting.
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
    """A performance target and its measured figure.

    Attributes:
        promise: in words.
        holds: whether it is met.
        measured: the figure; None if it could not be measured.
        low: lower end of its interval.
        high: upper end of its interval.
        figure: in words.
    """

    promise: str
    holds: bool
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    figure: str | None = None


class ComparisonFigures(ReportTable, frozen=True, kw_only=True):
    """The comparison with the baseline.

    Attributes:
        baseline: path of the report, as in the workflow.
        compared: whether it was measured on the same device.
        figures: compared.
        repetitions: number of repetitions of apparent regressions.
        noise_between_runs: a line for each figure that was worse in one run only.
    """

    baseline: str
    compared: bool
    figures: Count | None = None
    repetitions: Count | None = None
    noise_between_runs: tuple[str, ...] | None = None


class RankFigures(ReportTable, frozen=True, kw_only=True):
    """The speed of the training on the workflow's ranks and on one process, in a few updates of the train stage.

    Attributes:
        ranks: processes that train together.
        backend: of their communication.
        alone_tokens_per_second: learned from by one process.
        tokens_per_second: learned from by all ranks.
        efficiency: their speed as a share of that of as many single processes.
        waited_seconds: of each rank for the others.
    """

    ranks: Count
    backend: str
    alone_tokens_per_second: float
    tokens_per_second: float
    efficiency: float
    waited_seconds: tuple[Seconds, ...] = ()

    @property
    def words(self) -> str:
        """The figures in one line."""
        times = self.tokens_per_second / self.alone_tokens_per_second
        return (
            f"{self.ranks} ranks ({self.backend}) {self.tokens_per_second:,.0f} tokens/s, one process "
            f"{self.alone_tokens_per_second:,.0f} tokens/s: {times:.2f} times as fast, an efficiency of "
            f"{self.efficiency:.0%}"
        )


class BenchmarkReport(StageReport, frozen=True, kw_only=True):
    """The figures of a benchmark stage.

    Attributes:
        version: VERSION of the stage.
        device: that was measured.
        training: timed recipes, by batch size.
        drift: of the device's speed; None if nothing could be timed.
        convergence: of new models; None if not requested.
        models: by stage.
        bottleneck: of a step.
        promises: by name.
        lowered: a line for each measurement with fewer rounds or rows than requested.
        comparison: with the baseline; None without one.
        ranks: of the workflow; None if one process trains.
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
    ranks: RankFigures | None = None
