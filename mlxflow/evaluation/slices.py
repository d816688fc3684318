"""How much of an evaluation is computed at a time: rows through the body, then positions through the head.

Both follow MLX's memory limit, and neither depends on what the process did before, so that equal runs give equal sums.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# Of the memory limit: what the activations of one pass through the body may take, and what a slice of logits may
_BODY_SHARE, _SLICE_SHARE = 8, 16

# More logits at a time are no faster (`benchmarks/evaluation.py`)
_SLICE_BYTES = {"cpu": 128 << 20, "gpu": 512 << 20}

# Arrays as wide as the widest layer that a block holds at a time, in fp32, and those as wide as its attention scores
_WIDE_ARRAYS, _SCORE_ARRAYS = 8, 3

# Where a model does not say how many heads it has
_USUAL_HEAD_WIDTH = 64


def positions_at_once(vocab_size: int, *, arrays: int) -> int:
    """Return the positions whose logits are held at a time; at least one.

    Args:
        vocab_size: V.
        arrays: of V numbers in fp32 that are held for each position.
    """
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    room = min(_SLICE_BYTES[device], mx.get_memory_limit() // _SLICE_SHARE)
    return max(1, room // (4 * vocab_size * arrays))


def rows_at_once(model: nn.Module, *, context_length: int, most: int, logits: int = 0) -> int:
    """Return the rows that go through a model's body at a time; at least one.

    An estimate from the widths of its layers and the number of its heads.

    Args:
        model: of any architecture.
        context_length: positions of a row, L.
        most: rows at most.
        logits: numbers that the pass makes for each position besides, where a model gives nothing but logits.
    """
    shapes = [value.shape for _, value in tree_flatten(model.parameters()) if value.ndim > 1]
    vocab_size = max((shape[-2] for shape in shapes), default=1)
    widest = max((max(shape[-2:]) for shape in shapes if shape[-2] < vocab_size), default=vocab_size)
    heads = _num_heads(model) or -(-widest // _USUAL_HEAD_WIDTH)
    numbers = _WIDE_ARRAYS * widest + _SCORE_ARRAYS * heads * context_length + 2 * logits
    room = mx.get_memory_limit() // _BODY_SHARE
    return int(min(most, max(1, room // (4 * context_length * numbers))))


def _num_heads(model: nn.Module) -> int:
    """Return the most attention heads that a model's settings name; 0 where they name none."""
    settings = getattr(getattr(model, "args", None), "__dict__", {})
    tables = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    names = ("num_attention_heads", "n_heads", "n_head", "num_heads")
    return max((table.get(name) or 0 for table in tables for name in names), default=0)
