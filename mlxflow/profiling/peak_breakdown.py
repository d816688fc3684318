"""Break a memory peak down into weights, optimizer state, activations and other parts that add up to it."""

from collections.abc import Mapping


def compose(
    known: Mapping[str, int],
    *,
    peak_memory_bytes: int,
    reserved_bytes: int,
    process_bytes: int,
    lies_in_update: bool,
) -> dict[str, int]:
    """Return the bytes of each part of the process's memory at its peak.

    The parts of MLX's arrays add up to `peak_memory_bytes`. Weights, optimizer state and batches are held all the time.
    A peak in the forward and backward pass also has logits and gradients, and the rest counts as activations. A peak in
    the update also has gradients, and the rest counts as "update": new weights and moments beside the old ones.

    "cache" is freed buffers that MLX reserved beyond the arrays' peak, "other" is memory of the process outside MLX:
    libraries, Python, files. A freed buffer whose memory an array of the peak used counts once, as that array. All
    parts add up to `total_bytes`, the largest of the three sizes given.

    Args:
        known: weights_bytes, optimizer_bytes, gradients_bytes, data_bytes and logits_bytes.
        peak_memory_bytes: peak of MLX's arrays.
        reserved_bytes: peak of MLX's arrays and freed buffers together.
        process_bytes: peak of the process, in the memory that holds MLX's arrays; 0 if that is not known.
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
