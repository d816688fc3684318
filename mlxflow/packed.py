"""Models on rows in which several documents lie."""

import mlx.core as mx
import mlx.nn as nn


class _PackedRows:
    """Stands where mlx-lm's models expect a cache for a layer, and answers their question for a mask.

    The door that mlx-lm's own `create_attention_mask` offers: it asks the cache for a mask when it can make one.
    """

    offset = 0

    def __init__(self, pieces: mx.array) -> None:
        self._same = pieces[:, None, :, None] == pieces[:, None, None, :]

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return (B, 1, L, L): each position sees those before it, of its own document, within the window."""
        places = mx.arange(length)
        behind = places[:, None] - places[None, :]
        seen = behind >= 0 if window_size is None else (behind >= 0) & (behind < window_size)
        return self._same & seen

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return what was given: nothing is kept."""
        return keys, values


def apply(model: nn.Module, tokens: mx.array, marks: mx.array | None) -> mx.array:
    """Return a model's logits, (B, L, V).

    Args:
        model: of any architecture that mlx-lm knows; with marks, one with rotary positions (see `can_mask_documents`).
        tokens: (B, L) ids.
        marks: (B, L) which tokens of a row belong together; see `data.token_file.Batch`. None: all of them.
    """
    return _run(model, tokens, marks, model)


def apply_body(model: nn.Module, tokens: mx.array, marks: mx.array | None) -> mx.array:
    """Return what a model applies its head to, (B, L, D).

    Args:
        model: one whose body is its attribute `model`.
        tokens: see `apply`.
        marks: see `apply`.
    """
    return _run(model.model, tokens, marks, model)


def _run(module: nn.Module, tokens: mx.array, marks: mx.array | None, model: nn.Module) -> mx.array:
    caches = None if marks is None else [_PackedRows(marks >> 1)] * len(model.layers)
    result: mx.array = module(tokens) if caches is None else module(tokens, cache=caches)
    return result


def can_mask_documents(model: nn.Module, vocab_size: int) -> bool:
    """Return whether documents packed into one row get the logits that each gets alone.

    Asked of the model itself on a few tokens: learned absolute positions, or layers that carry a state from token to
    token, fail it.
    """
    was_training = model.training
    model.eval()
    tokens = mx.arange(1, 13)[None] % vocab_size
    marks = mx.array([[2] * 5 + [4] * 7])
    try:
        packed = apply(model, tokens, marks)
        alone = mx.concatenate([model(tokens[:, :5]), model(tokens[:, 5:])], axis=1)
        difference = mx.abs(packed - alone).astype(mx.float32).max() / mx.abs(alone).astype(mx.float32).max()
        fits = float(difference) < 0.05  # bf16 differs by 0.01, another position by about 1
    except (AttributeError, TypeError, ValueError):
        fits = False
    model.train(was_training)
    return bool(fits)
