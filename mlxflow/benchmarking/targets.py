"""The promises of mlxflow, each with the measured figure of a benchmark and whether it holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The largest share of a step spent waiting for data that counts as none
_LITTLE_WAIT = 0.02
# Required compression over fp32; if the requested bits allow less, the required share of what they allow
_LEAST_RATIO, _REACHED_SHARE = 4.0, 0.9


def keep_promises(
    training: Sequence[Mapping[str, Any]],
    models: Iterable[Mapping[str, Any]],
    data_share: float | None,
    own_batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Return the report's `promises`: text, measured figure and whether it holds, by name.

    A promise that could not be measured has no `measured`, and does not hold.

    Args:
        training: rows of the report's `training`.
        models: rows of the report's `models`.
        data_share: share of a step spent waiting for data; None if no step could be run.
        own_batch_size: the batch size at which the workflow is compared with the baseline.
    """
    timed = {row["name"]: row for row in training if row["batch_size"] == own_batch_size and "error" not in row}
    baseline, workflow = timed.get("baseline"), timed.get("workflow")
    promises: dict[str, dict[str, Any]] = {
        name: {"promise": promise, "holds": False}
        for name, promise in (
            ("training_speed", "training 1.5 to 2.5 times as fast as the baseline"),
            ("training_memory", "30 to 50 % less memory in training"),
            ("model_size", "models 4 to 8 times smaller than fp32, or as many times as the bits asked for allow"),
            ("data_wait", "waiting for data close to none"),
        )
    }
    if workflow is not None and baseline is not None:
        promises["training_speed"] |= _speed(baseline, workflow)
        promises["training_memory"] |= _memory(
            baseline["peak_memory_bytes"], workflow["peak_memory_bytes"], own_batch_size
        )
    sized = [row for row in models if "compression_ratio_fp32" in row]
    quantized = [row for row in sized if "asked_bits_per_weight" in row]
    if not quantized:  # else the smallest of all models
        quantized = sorted(sized, key=lambda row: row["compression_ratio_fp32"])[-1:]
    if quantized:
        promises["model_size"] |= _sizes(quantized)
    if data_share is not None:
        figure = f"{data_share:.2%} of a step"
        promises["data_wait"] |= {"measured": data_share, "holds": data_share < _LITTLE_WAIT, "figure": figure}
    return promises


def _speed(baseline: Mapping[str, Any], workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of tokens per second without padding, from paired rounds if there are some."""
    ratio = baseline.get("workflow_speedup", workflow["tokens_per_second"] / baseline["tokens_per_second"])
    low = baseline.get("low_workflow_speedup", ratio)
    high = baseline.get("high_workflow_speedup", ratio)
    return {
        "measured": ratio,
        "low": low,
        "high": high,
        "holds": low >= 1.5,
        "figure": f"{ratio:.2f} times ({low:.2f} to {high:.2f}): {workflow['tokens_per_second']:,.0f} tokens a second "
        f"instead of {baseline['tokens_per_second']:,.0f} at {workflow['batch_size']} rows",
    }


def _sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the compression of each model over fp32, compared with what the bits of its plan allow.

    8 bits per weight and their scales allow a factor of 3.8: the promise holds then, too.
    """
    figures, holds = [], True
    for row in rows:
        ratio = row["compression_ratio_fp32"]
        allowed = 32 / row["asked_bits_per_weight"] if "asked_bits_per_weight" in row else _LEAST_RATIO
        holds = holds and ratio >= min(_LEAST_RATIO, _REACHED_SHARE * allowed)
        figure = f"{row['model']} {ratio:.1f} times"
        figure += f" (its bits allow {allowed:.1f})" if "asked_bits_per_weight" in row else ""
        if "compression_ratio" in row:
            figure += f", {row['compression_ratio']:.1f} than the trained model"
        figures.append(f"{figure}, perplexity {row['perplexity']:.2f} ± {row['perplexity_standard_error']:.2f}")
    return {
        "measured": max(row["compression_ratio_fp32"] for row in rows),
        "holds": holds,
        "figure": "; ".join(figures),
    }


def _memory(baseline: int, workflow: int, batch_size: int) -> dict[str, Any]:
    saved = 1 - workflow / baseline
    word = "less" if saved >= 0 else "more"
    figure = f"{abs(saved):.0%} {word}: {workflow:,} bytes instead of {baseline:,} at {batch_size} rows"
    return {"measured": saved, "holds": saved >= 0.3, "figure": figure}
