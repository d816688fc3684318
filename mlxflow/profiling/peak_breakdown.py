"""Break a memory peak down into weights, optimizer state, activations and other parts that add up to it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlxflow.report.stage_reports.profile import PeakParts


class StepBytes(NamedTuple):
    """The bytes of a step's arrays whose sizes are known from the model and its settings."""

    weights: int
    optimizer: int
    gradients: int
    data: int


def compose(
    known: StepBytes,
    *,
    logits_bytes: int,
    peak_memory_bytes: int,
    reserved_bytes: int,
    process_bytes: int,
    lies_in_update: bool,
) -> PeakParts:
    """Return the bytes of each part of the process's memory at its peak.

    The parts of MLX's arrays add up to `peak_memory_bytes`. Weights, optimizer state and batches are held all the time.
    A peak in the forward and backward pass also has logits and gradients, and the rest counts as activations. A peak in
    the update also has gradients, and the rest counts as "update": new weights and moments beside the old ones.

    "cache" is freed buffers that MLX reserved beyond the arrays' peak, "other" is memory of the process outside MLX:
    libraries, Python, files. A freed buffer whose memory an array of the peak used counts once, as that array. All
    parts add up to `total_bytes`, the largest of the three sizes given.

    Args:
        known: of the step.
        logits_bytes: that head and loss take beyond their inputs and gradients.
        peak_memory_bytes: peak of MLX's arrays.
        reserved_bytes: peak of MLX's arrays and freed buffers together.
        process_bytes: peak of the process, in the memory that holds MLX's arrays; 0 if that is not known.
        lies_in_update: whether the peak lies in the update; else in the forward and backward pass.
    """
    wanted = (known.weights, known.optimizer, known.data, 0 if lies_in_update else logits_bytes, known.gradients)
    weights, optimizer, data, logits, gradients = _within(wanted, peak_memory_bytes)
    left = peak_memory_bytes - (weights + optimizer + data + logits + gradients)
    cache = max(0, reserved_bytes - peak_memory_bytes)
    other = max(0, process_bytes - max(peak_memory_bytes, reserved_bytes))
    return PeakParts(
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        data_bytes=data,
        logits_bytes=logits,
        gradients_bytes=gradients,
        activations_bytes=0 if lies_in_update else left,
        update_bytes=left if lies_in_update else 0,
        cache_bytes=cache,
        other_bytes=other,
        total_bytes=peak_memory_bytes + cache + other,
    )


def _within(sizes: Iterable[int], total: int) -> Iterator[int]:
    """Yield each size, or what is left of the total if that is less."""
    left = total
    for size in sizes:
        here = min(size, left)
        left -= here
        yield here
