"""The rows of a benchmark's report: ways of training, and models; `low_` and `high_` are the ends of an interval."""

from typing import Annotated, NamedTuple

from msgspec import Meta

from mlxflow.storage.report_structs import Count, ReportTable, Seconds, Share

_Speed = Annotated[float, Meta(gt=0, le=1e18)]
_Bytes = Annotated[int, Meta(ge=1, le=2**62)]


class Bounded(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


class TimedFigures(NamedTuple):
    """The figures that every timed row of training has; see `TrainingRow`."""

    num_steps: int
    speed: Bounded
    samples_per_second: float
    peak_memory_bytes: int
    data_wait_share: float


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
    def speed(self) -> Bounded | None:
        """Tokens learned from per second; None where it was not timed."""
        return _bounded(self.tokens_per_second, self.low_tokens_per_second, self.high_tokens_per_second)

    @property
    def speedup(self) -> Bounded | None:
        """Speed of the workflow by that of the row; None where they were not timed together."""
        return _bounded(self.workflow_speedup, self.low_workflow_speedup, self.high_workflow_speedup)

    @property
    def timed(self) -> TimedFigures | None:
        """The figures; None where it was not timed."""
        steps, speed, rows, wait = self.num_steps, self.speed, self.samples_per_second, self.data_wait_share
        if steps is None or speed is None or rows is None or wait is None or self.peak_memory_bytes is None:
            return None
        return TimedFigures(steps, speed, rows, self.peak_memory_bytes, wait)


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

    @property
    def speed(self) -> Bounded:
        """Tokens read per second."""
        return Bounded(self.tokens_per_second, self.low_tokens_per_second, self.high_tokens_per_second)


class ModelFigures(NamedTuple):
    """The figures that every model has that could be measured; see `ModelRow`."""

    model_bytes: int
    compression_ratio: float
    compression_ratio_fp32: float
    decode_speed: Bounded
    perplexity: float
    perplexity_standard_error: float


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
    perplexity: Annotated[float, Meta(gt=0)] | None = None
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
    def decode_speed(self) -> Bounded | None:
        """Tokens per second written one by one; None where it was not measured."""
        return _bounded(
            self.decode_tokens_per_second, self.low_decode_tokens_per_second, self.high_decode_tokens_per_second
        )

    @property
    def measured(self) -> ModelFigures | None:
        """The figures; None where there is an error, or the speed alone was measured."""
        size, ratio, ratio_fp32 = self.model_bytes, self.compression_ratio, self.compression_ratio_fp32
        speed, perplexity, error = self.decode_speed, self.perplexity, self.perplexity_standard_error
        if size is None or ratio is None or ratio_fp32 is None or speed is None or perplexity is None or error is None:
            return None
        return ModelFigures(size, ratio, ratio_fp32, speed, perplexity, error)


def _bounded(value: float | None, low: float | None, high: float | None) -> Bounded | None:
    return None if value is None or low is None or high is None else Bounded(value, low, high)


_OF_TIMED_ROWS = (
    *("num_steps", "median_step_seconds", "low_step_seconds", "high_step_seconds", "samples_per_second"),
    *("tokens_per_second", "low_tokens_per_second", "high_tokens_per_second", "peak_memory_bytes", "data_wait_share"),
)
_OF_GENERATION = tuple(f"{end}decode_tokens_per_second" for end in ("", "low_", "high_"))


def _require_all(row: TrainingRow | ModelRow, names: tuple[str, ...]) -> None:
    missing = [name for name in names if getattr(row, name) is None]
    if missing and row.error is None:
        raise ValueError(f"expected `{missing[0]}` or `error`")
