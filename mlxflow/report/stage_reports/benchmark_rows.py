"""The rows of a benchmark's report: recipes of training, and models; `low_` and `high_` are the ends of an interval."""

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
    """One recipe of training at one batch size; it has either `error`, the reason why it was not timed, or all figures.

    Attributes:
        name: "baseline", "workflow" or "without" an optimization.
        batch_size: rows in a forward pass.
        error: why it was not timed; None if it was.
        num_steps: timed.
        median_step_seconds: of a step, with `low_step_seconds` and `high_step_seconds`.
        confidence: of the intervals.
        samples_per_second: rows.
        tokens_per_second: learned from.
        tokens_per_second_per_gb: by `peak_memory_bytes`.
        peak_memory_bytes: highest memory of MLX's arrays.
        data_wait_share: share of a step spent waiting for batches.
        compile_seconds: extra time of the first step.
        machine_seconds: of the fixed work in the same rounds; None if not timed.
        low_relative_tokens_per_second: tokens in the time of the fixed work, lower end.
        high_relative_tokens_per_second: the same, upper end.
        processed_tokens_per_second: tokens that the model processes, without padding.
        workflow_speedup: tokens per second of the workflow divided by those of the row; None if not timed together.
        low_workflow_speedup: lower end.
        high_workflow_speedup: upper end.
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
        """Trained tokens per second; None if not timed."""
        return _bounded(self.tokens_per_second, self.low_tokens_per_second, self.high_tokens_per_second)

    @property
    def speedup(self) -> Bounded | None:
        """Speed of the workflow divided by that of the row; None if they were not timed together."""
        return _bounded(self.workflow_speedup, self.low_workflow_speedup, self.high_workflow_speedup)

    @property
    def timed(self) -> TimedFigures | None:
        """The figures; None if it was not timed."""
        steps, speed, rows, wait = self.num_steps, self.speed, self.samples_per_second, self.data_wait_share
        if steps is None or speed is None or rows is None or wait is None or self.peak_memory_bytes is None:
            return None
        return TimedFigures(steps, speed, rows, self.peak_memory_bytes, wait)


class PrefillFigures(ReportTable, frozen=True, kw_only=True):
    """Prefill speed of a model.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens_per_second: of the prompt, with its interval.
        low_relative_tokens_per_second: tokens in the time of the fixed work, lower end.
        high_relative_tokens_per_second: the same, upper end.
    """

    prompt_tokens: Count
    tokens_per_second: _Speed
    low_tokens_per_second: _Speed
    high_tokens_per_second: _Speed
    low_relative_tokens_per_second: _Speed | None = None
    high_relative_tokens_per_second: _Speed | None = None

    @property
    def speed(self) -> Bounded:
        """Prompt tokens per second."""
        return Bounded(self.tokens_per_second, self.low_tokens_per_second, self.high_tokens_per_second)


class ModelFigures(NamedTuple):
    """The figures of every measured model, and the perplexity if there are tokens; see `ModelRow`."""

    model_bytes: int
    compression_ratio: float
    compression_ratio_fp32: float
    decode_speed: Bounded
    perplexity: float | None
    perplexity_standard_error: float | None


class ModelRow(ReportTable, frozen=True, kw_only=True):
    """A model; it has either `error`, the reason why it was not measured, or its speeds.

    Attributes:
        model: the stage that made it, such as "quantize:q4".
        model_bytes: of its weights on the disk.
        error: why it was not measured; None if it was.
        compression_ratio: size of the dense model's files by `model_bytes`.
        compression_ratio_fp32: size of the weights in fp32 by `model_bytes`.
        compression_ratio_bf16: size of the weights in bf16 by `model_bytes`.
        asked_bits_per_weight: by the plan of quantization; None for a dense model.
        prefill: by length of the prompt.
        decode_tokens_per_second: generated one by one, with its interval.
        low_relative_decode_tokens_per_second: tokens in the time of the fixed work, lower end.
        high_relative_decode_tokens_per_second: the same, upper end.
        machine_seconds: of the fixed work in the same rounds.
        peak_memory_bytes: highest memory of MLX's arrays.
        perplexity: on validation rows; None without tokens.
        perplexity_standard_error: of the same.
        validation_tokens: predicted.
        validation_rows: read.
        has_fewer_rows: whether the time did not suffice for all requested rows.
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
        """Decode speed in tokens per second; None if not measured."""
        return _bounded(
            self.decode_tokens_per_second, self.low_decode_tokens_per_second, self.high_decode_tokens_per_second
        )

    @property
    def measured(self) -> ModelFigures | None:
        """The figures; None if there is an error, or only the speed was measured."""
        size, ratio, ratio_fp32 = self.model_bytes, self.compression_ratio, self.compression_ratio_fp32
        speed = self.decode_speed
        if size is None or ratio is None or ratio_fp32 is None or speed is None:
            return None
        return ModelFigures(size, ratio, ratio_fp32, speed, self.perplexity, self.perplexity_standard_error)


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
