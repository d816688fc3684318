"""What a peak of memory is made of, adding up to the whole."""

from collections.abc import Mapping


def compose(
    known: Mapping[str, int],
    *,
    peak_memory_bytes: int,
    cache_memory_bytes: int,
    outside_bytes: int,
    lies_in_update: bool,
) -> dict[str, int]:
    """Return the bytes of each part of what the process takes at its highest.

    Weights, optimizer state and batches are there all the time. In the forward and backward pass logits, gradients and
    activations come to them, and what no tree accounts for is activations; in the update the gradients and, as
    "other", the new weights and moments beside the old ones. The parts add up to `total_bytes`: MLX's peak, the
    buffers it keeps, and the process's memory outside MLX.

    Args:
        known: weights_bytes, optimizer_bytes, gradients_bytes, data_bytes and logits_bytes.
        peak_memory_bytes: the most that MLX's arrays held.
        cache_memory_bytes: of freed buffers that MLX keeps, at a step's end.
        outside_bytes: what of the process lies in main memory and is not MLX's: libraries, Python, files.
        lies_in_update: whether that peak lies in the update; else in the forward and backward pass.
    """
    parts: dict[str, int] = {}
    left = peak_memory_bytes
    for name in ("weights_bytes", "optimizer_bytes", "data_bytes", "logits_bytes", "gradients_bytes"):
        here = 0 if lies_in_update and name == "logits_bytes" else known[name]
        parts[name] = min(here, left)
        left -= parts[name]
    parts["activations_bytes"] = 0 if lies_in_update else left
    parts["cache_bytes"] = cache_memory_bytes
    parts["other_bytes"] = outside_bytes + (left if lies_in_update else 0)
    return parts | {"total_bytes": sum(parts.values())}
