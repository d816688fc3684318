"""Sizes of the slices of an evaluation: rows in a pass through the body, positions in a pass through the head.

Both follow from MLX's memory limit, and not from what the process did before, so that equal runs give equal sums.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.device import memory_limit

# Fractions of the memory limit, as divisors: for the activations of a pass through the body, and for a slice of logits
_BODY_SHARE, _SLICE_SHARE = 8, 16

# Largest activations of a pass through the body, and largest slices of logits; larger ones are no faster
# (`benchmarks/evaluation.py`)
_BODY_BYTES = {"cpu": 128 << 20, "gpu": 4 << 30}
_SLICE_BYTES = {"cpu": 128 << 20, "gpu": 512 << 20}

# fp32 arrays that a block holds at a time: as wide as the widest layer, and as large as the attention scores
_WIDE_ARRAYS, _SCORE_ARRAYS = 8, 3

# Assumed if a model's settings do not name the number of heads
_USUAL_HEAD_WIDTH = 64


def positions_at_once(vocab_size: int, *, arrays: int) -> int:
    """Return the number of positions whose logits are held at a time; at least one.

    Args:
        vocab_size: V.
        arrays: fp32 arrays of V numbers that are held for each position.
    """
    room = min(_SLICE_BYTES[_device()], memory_limit.allowed_bytes() // _SLICE_SHARE)
    return max(1, room // (4 * vocab_size * arrays))


def rows_at_once(model: nn.Module, *, context_length: int, most: int, logits: int = 0) -> int:
    """Return the number of rows in a pass through a model's body; at least one.

    Estimated from the widths of its layers and the number of its heads.

    Args:
        model: of any architecture.
        context_length: positions of a row, L.
        most: upper bound.
        logits: logits for each position that the pass also computes, for a model without a recognized body.
    """
    shapes = [value.shape for _, value in tree_flatten(model.parameters()) if value.ndim > 1]
    vocab_size = max((shape[-2] for shape in shapes), default=1)
    widest = max((max(shape[-2:]) for shape in shapes if shape[-2] < vocab_size), default=vocab_size)
    heads = num_heads(model) or -(-widest // _USUAL_HEAD_WIDTH)
    numbers = _WIDE_ARRAYS * widest + _SCORE_ARRAYS * heads * context_length + 2 * logits
    room = min(_BODY_BYTES[_device()], memory_limit.allowed_bytes() // _BODY_SHARE)
    return int(min(most, max(1, room // (4 * context_length * numbers))))


def _device() -> str:
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def num_heads(model: nn.Module) -> int:
    """Return the largest number of attention heads in a model's settings; 0 if they have none."""
    settings = getattr(getattr(model, "args", None), "__dict__", {})
    tables = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    names = ("num_attention_heads", "n_heads", "n_head", "num_heads")
    return max((table.get(name) or 0 for table in tables for name in names), default=0)
