"""The figures of a benchmark stage, as report.toml holds them; `low_` and `high_` are the ends of an interval."""

from typing import Annotated, NamedTuple

from msgspec import Meta

from mlxflow.storage.report_structs import Count, ReportTable, Seconds, Share, StageReport

_Speed = Annotated[float, Meta(gt=0, le=1e18)]
_Bytes = Annotated[int, Meta(ge=1, le=2**62)]


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


class Speed(NamedTuple):
    """Tokens per second: the median and the ends of its interval."""

    value: float
    low: float
    high: float


class TrainingRow(ReportTable, frozen=True, kw_only=True):
    """One way of training at one batch size; either `error` says why it was not timed, or it has all figures.

    Attributes:
        name: "baseline", "workflow" or "without" an optimization.
        batch_size: rows in a forward pass.
        error: why it was not timed; None where it was.
        num_steps: timed.
        median_step_seconds: of a step, with `low_step_seconds` and `high_step_seconds`.
        confidence: of the intervals.
        samples_per_second: rows.
        tokens_per_second: learned from.
        tokens_per_second_per_gb: by `peak_memory_bytes`.
        peak_memory_bytes: most that MLX's arrays held.
        data_wait_share: of a step, waiting for batches.
        compile_seconds: by which the first step took longer.
        machine_seconds: of the fixed work of the same rounds; None where none was timed.
        low_relative_tokens_per_second: tokens in the time of the fixed work, least.
        high_relative_tokens_per_second: the same, most.
        processed_tokens_per_second: tokens that the model reads, padding left out.
        workflow_speedup: tokens per second of the workflow by those of the row; None where not timed together.
        low_workflow_speedup: least.
        high_workflow_speedup: most.
        verdict: on the speedup, in words.
    """

    name: str
    batch_size: Count
    error: str | None = None
    num_steps: Count | None = None
    median_step_seconds: Seconds | None = None
    low_step_seconds: Seconds | None = None
    high_step_seconds: Seconds | None = None
    confidence: Share | None = None
    samples_per_second: _Speed | None = None
    tokens_per_second: _Speed | None = None
    low_tokens_per_second: _Speed | None = None
    high_tokens_per_second: _Speed | None = None
    tokens_per_second_per_gb: float | None = None
    peak_memory_bytes: _Bytes | None = None
    data_wait_share: float | None = None
    compile_seconds: Seconds | None = None
    machine_seconds: Seconds | None = None
    low_relative_tokens_per_second: _Speed | None = None
    high_relative_tokens_per_second: _Speed | None = None
    processed_tokens_per_second: float | None = None
    workflow_speedup: float | None = None
    low_workflow_speedup: float | None = None
    high_workflow_speedup: float | None = None
    verdict: str | None = None

    def __post_init__(self) -> None:
        """Refuse a row with neither figures nor an error.

        Raises:
            ValueError: a figure is missing.
        """
        _require_all(self, _OF_TIMED_ROWS)

    @property
    def speed(self) -> Speed | None:
        """Tokens learned from per second; None where it was not timed."""
        return _speed(self.tokens_per_second, self.low_tokens_per_second, self.high_tokens_per_second)


class PrefillFigures(ReportTable, frozen=True, kw_only=True):
    """How fast a model reads a prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens_per_second: read, with its interval.
        low_relative_tokens_per_second: tokens in the time of the fixed work, least.
        high_relative_tokens_per_second: the same, most.
    """

    prompt_tokens: Count
    tokens_per_second: _Speed
    low_tokens_per_second: _Speed
    high_tokens_per_second: _Speed
    low_relative_tokens_per_second: _Speed | None = None
    high_relative_tokens_per_second: _Speed | None = None


class ModelRow(ReportTable, frozen=True, kw_only=True):
    """A model; either `error` says why it was not measured, or it has its speeds.

    Attributes:
        model: the stage that made it, such as "quantize:q4".
        model_bytes: of its weights on the disk.
        error: why it was not measured; None where it was.
        compression_ratio: size of the dense model's files by `model_bytes`.
        compression_ratio_fp32: size of the weights in fp32 by `model_bytes`.
        compression_ratio_bf16: size of the weights in bf16 by `model_bytes`.
        asked_bits_per_weight: by the plan of quantization; None for a dense model.
        prefill: by length of the prompt.
        decode_tokens_per_second: written one by one, with its interval.
        low_relative_decode_tokens_per_second: tokens in the time of the fixed work, least.
        high_relative_decode_tokens_per_second: the same, most.
        machine_seconds: of the fixed work of the same rounds.
        peak_memory_bytes: most that MLX's arrays held.
        perplexity: on validation rows.
        perplexity_standard_error: of the same.
        validation_tokens: predicted.
        validation_rows: read.
        has_fewer_rows: whether there was no time for all rows that were asked for.
    """

    model: str
    model_bytes: _Bytes | None = None
    error: str | None = None
    compression_ratio: _Speed | None = None
    compression_ratio_fp32: _Speed | None = None
    compression_ratio_bf16: _Speed | None = None
    asked_bits_per_weight: _Speed | None = None
    prefill: tuple[PrefillFigures, ...] = ()
    decode_tokens_per_second: _Speed | None = None
    low_decode_tokens_per_second: _Speed | None = None
    high_decode_tokens_per_second: _Speed | None = None
    low_relative_decode_tokens_per_second: _Speed | None = None
    high_relative_decode_tokens_per_second: _Speed | None = None
    machine_seconds: Seconds | None = None
    peak_memory_bytes: _Bytes | None = None
    perplexity: _Speed | None = None
    perplexity_standard_error: Annotated[float, Meta(ge=0)] | None = None
    validation_tokens: Count | None = None
    validation_rows: Count | None = None
    has_fewer_rows: bool | None = None

    def __post_init__(self) -> None:
        """Refuse a row with neither speeds nor an error, and a perplexity without its error.

        Raises:
            ValueError: a figure is missing.
        """
        _require_all(self, _OF_GENERATION)
        if self.perplexity is not None and self.perplexity_standard_error is None:
            raise ValueError("`perplexity` without `perplexity_standard_error`")

    @property
    def decode_speed(self) -> Speed | None:
        """Tokens per second written one by one; None where it was not measured."""
        return _speed(
            self.decode_tokens_per_second, self.low_decode_tokens_per_second, self.high_decode_tokens_per_second
        )


def _speed(value: float | None, low: float | None, high: float | None) -> Speed | None:
    return None if value is None or low is None or high is None else Speed(value, low, high)


_OF_TIMED_ROWS = (
    *("num_steps", "median_step_seconds", "low_step_seconds", "high_step_seconds", "samples_per_second"),
    *("tokens_per_second", "low_tokens_per_second", "high_tokens_per_second", "peak_memory_bytes", "data_wait_share"),
)
_OF_GENERATION = tuple(f"{end}decode_tokens_per_second" for end in ("", "low_", "high_"))


def _require_all(row: TrainingRow | ModelRow, names: tuple[str, ...]) -> None:
    missing = [name for name in names if getattr(row, name) is None]
    if missing and row.error is None:
        raise ValueError(f"expected `{missing[0]}` or `error`")


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
