"""The performance targets ("promises") of mlxflow, compared with the figures of a benchmark."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.report.stage_reports.benchmark import PromiseFigures
from mlxflow.report.stage_reports.benchmark_rows import Bounded, ModelFigures, ModelRow, TimedFigures, TrainingRow

# The largest share of a step spent waiting for data that counts as none
_LITTLE_WAIT = 0.02
# Required compression over fp32; if the requested bits allow less, the required share of what they allow
_LEAST_RATIO, _REACHED_SHARE = 4.0, 0.9

#: The name of the target that depends on the models alone.
MODEL_SIZE = "model_size"

_TRAINING_SPEED = "training 1.5 to 2.5 times as fast as the baseline"
_TRAINING_MEMORY = "30 to 50 % less memory in training"
_MODEL_SIZE = "models 4 to 8 times smaller than fp32, or as many times as the requested bits allow"
_DATA_WAIT = "waiting for data close to none"


def check_targets(
    training: Iterable[TrainingRow],
    models: Iterable[ModelRow],
    data_share: float | None,
    own_batch_size: int,
) -> dict[str, PromiseFigures]:
    """Return the report's `promises`, by name.

    A target that could not be measured has no `measured` and is not met.

    Args:
        training: rows of the report's `training`.
        models: rows of the report's `models`.
        data_share: share of a step spent waiting for data; None if no step could be run.
        own_batch_size: the batch size at which the workflow is compared with the baseline.
    """
    promises = {
        "training_speed": PromiseFigures(promise=_TRAINING_SPEED, holds=False),
        "training_memory": PromiseFigures(promise=_TRAINING_MEMORY, holds=False),
        MODEL_SIZE: PromiseFigures(promise=_MODEL_SIZE, holds=False),
        "data_wait": PromiseFigures(promise=_DATA_WAIT, holds=False),
    }
    timed = {
        row.name: (row.timed, row.speedup)
        for row in training
        if row.batch_size == own_batch_size and row.timed is not None
    }
    if "baseline" in timed and "workflow" in timed:
        (baseline, speedup), (workflow, _) = timed["baseline"], timed["workflow"]
        promises["training_speed"] = _speed(baseline, workflow, speedup, own_batch_size)
        promises["training_memory"] = _memory(baseline, workflow, own_batch_size)
    if sized := _sized(models):
        promises[MODEL_SIZE] = _sizes(sized)
    if data_share is not None:
        promises["data_wait"] = PromiseFigures(
            promise=_DATA_WAIT,
            holds=data_share < _LITTLE_WAIT,
            measured=data_share,
            figure=f"{data_share:.2%} of a step",
        )
    return promises


def _speed(baseline: TimedFigures, workflow: TimedFigures, speedup: Bounded | None, batch_size: int) -> PromiseFigures:
    """Return the ratio of tokens per second without padding, from paired rounds if there are some."""
    own, other = workflow.speed.value, baseline.speed.value
    ratio, low, high = speedup or Bounded(own / other, own / other, own / other)
    return PromiseFigures(
        promise=_TRAINING_SPEED,
        holds=low >= 1.5,
        measured=ratio,
        low=low,
        high=high,
        figure=f"{ratio:.2f} times ({low:.2f} to {high:.2f}): {own:,.0f} tokens a second "
        f"instead of {other:,.0f} at {batch_size} rows",
    )


class _Sized(NamedTuple):
    """A measured model, and the bits per weight that its plan requested; None for a dense one."""

    name: str
    figures: ModelFigures
    asked_bits: float | None


def _sized(models: Iterable[ModelRow]) -> list[_Sized]:
    """Return the quantized models; without one, the smallest of all."""
    sized = [_Sized(row.model, row.measured, row.asked_bits_per_weight) for row in models if row.measured is not None]
    quantized = [one for one in sized if one.asked_bits is not None]
    return quantized or sorted(sized, key=lambda one: one.figures.compression_ratio_fp32)[-1:]


def _sizes(models: Sequence[_Sized]) -> PromiseFigures:
    """Return the compression of each model over fp32, compared with what the bits of its plan allow.

    8 bits per weight and their scales allow a factor of 3.8: the promise holds then, too.
    """
    texts, holds = [], True
    for name, figures, bits in models:
        ratio = figures.compression_ratio_fp32
        allowed = _LEAST_RATIO if bits is None else 32 / bits
        holds = holds and ratio >= min(_LEAST_RATIO, _REACHED_SHARE * allowed)
        bound = "" if bits is None else f" (its bits allow {allowed:.1f})"
        texts.append(f"{name} {ratio:.1f} times{bound}, {figures.compression_ratio:.1f} than the dense model")
        if figures.perplexity is not None:
            texts[-1] += f", perplexity {figures.perplexity:.2f} ± {figures.perplexity_standard_error:.2f}"
    return PromiseFigures(
        promise=_MODEL_SIZE,
        holds=holds,
        measured=max(model.figures.compression_ratio_fp32 for model in models),
        figure="; ".join(texts),
    )


def _memory(baseline: TimedFigures, workflow: TimedFigures, batch_size: int) -> PromiseFigures:
    own, other = workflow.peak_memory_bytes, baseline.peak_memory_bytes
    saved = 1 - own / other
    word = "less" if saved >= 0 else "more"
    figure = f"{abs(saved):.0%} {word}: {show_bytes(own)} instead of {show_bytes(other)} at {batch_size} rows"
    return PromiseFigures(promise=_TRAINING_MEMORY, holds=saved >= 0.3, measured=saved, figure=figure)
