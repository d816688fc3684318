"""What a peak of memory is made of, adding up to the whole."""

from collections.abc import Mapping


def compose(
    known: Mapping[str, int],
    *,
    peak_memory_bytes: int,
    reserved_bytes: int,
    process_bytes: int,
    lies_in_update: bool,
) -> dict[str, int]:
    """Return the bytes of each part of what the process takes at its highest.

    The parts of MLX's arrays add up to `peak_memory_bytes`. Weights, optimizer state and batches are there all the
    time. The forward and backward pass adds logits, gradients and activations, and what no tree accounts for is
    activations; the update has the gradients and, as "update", new weights and moments beside the old ones.

    Beside the arrays at their peak lie the freed buffers that MLX took from the system beyond that peak, as "cache",
    and what of the process is not MLX's, as "other": libraries, Python, files. A freed buffer that an array of the peak
    lay in counts once, as that array. All of it adds up to `total_bytes`, the largest of the three sizes given.

    Args:
        known: weights_bytes, optimizer_bytes, gradients_bytes, data_bytes and logits_bytes.
        peak_memory_bytes: the most that MLX's arrays held.
        reserved_bytes: the most that MLX held of arrays and freed buffers together, at any one time.
        process_bytes: the most that the process took of the memory that MLX's arrays lie in; 0 where that is not known.
        lies_in_update: whether the peak lies in the update; else in the forward and backward pass.
    """
    parts: dict[str, int] = {}
    left = peak_memory_bytes
    for name in ("weights_bytes", "optimizer_bytes", "data_bytes", "logits_bytes", "gradients_bytes"):
        here = 0 if lies_in_update and name == "logits_bytes" else known[name]
        parts[name] = min(here, left)
        left -= parts[name]
    parts["activations_bytes"] = 0 if lies_in_update else left
    parts["update_bytes"] = left if lies_in_update else 0
    parts["cache_bytes"] = max(0, reserved_bytes - peak_memory_bytes)
    parts["other_bytes"] = max(0, process_bytes - max(peak_memory_bytes, reserved_bytes))
    return parts | {"total_bytes": sum(parts.values())}
