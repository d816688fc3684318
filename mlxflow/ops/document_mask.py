"""Attention masks that keep the documents packed into one row apart, and forward passes with them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching
from mlxflow.ops.copying_products import copying_products


class Bounds:
    """The first key that each query of a mask sees; the last is the query's own position.

    Attention that skips masked keys looks masks up here. A mask is found by identity: one that a model changed is not.
    """

    def __init__(self) -> None:
        self._known: list[tuple[mx.array, mx.array]] = []

    def note(self, mask: mx.array, first: mx.array) -> None:
        """Remember the first keys, (B or 1, L), of a mask."""
        self._known.append((mask, first))

    def of(self, mask: Any) -> mx.array | None:
        """Return the first key that each query sees, (B or 1, L) in int32; None for a mask that was not noted."""
        return next((first for known, first in self._known if known is mask), None)


_NOTING: list[Bounds] = []


@contextmanager
def noted_bounds() -> Iterator[Bounds]:
    """Note the bounds of the masks of documents and of windows that are made until the block ends."""
    bounds = Bounds()
    base = sys.modules.get("mlx_lm.models.base")  # absent where no model of mlx-lm's was imported
    plain: Any = getattr(base, "create_causal_mask", None)

    def create(length: int, offset: int = 0, window_size: int | None = None, **others: Any) -> mx.array:
        mask: mx.array = plain(length, offset, window_size, **others)
        if not offset and not others:
            bounds.note(mask, _first_seen(length, window_size)[None])
        return mask

    _NOTING.append(bounds)
    try:
        with patching.attributes(*([] if base is None else [(base, "create_causal_mask", create)]), by=__name__):
            yield bounds
    finally:
        _NOTING.remove(bounds)


def _first_seen(length: int, window_size: int | None) -> mx.array:
    """Return the first key in the window of each query, (L,)."""
    places = mx.arange(length, dtype=mx.int32)
    return mx.zeros_like(places) if window_size is None else mx.maximum(places - window_size + 1, 0)


class _PackedRows:
    """A stand-in for a layer's key-value cache that supplies the mask.

    mlx-lm's `create_attention_mask` calls `make_mask` of a cache that has it.
    """

    offset = 0

    def __init__(self, pieces: mx.array, *, groups_heads: bool = False) -> None:
        self._pieces = pieces
        self._same = pieces[:, None, :, None] == pieces[:, None, None, :]
        if groups_heads:  # else the batch axis would broadcast against the key heads
            self._same = self._same[:, None]

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return (B, 1, L, L): each position sees itself and earlier ones of its document within the window.

        (B, 1, 1, L, L) for models whose scores have an axis for key heads and one for the queries of each.
        """
        places = mx.arange(length)
        behind = places[:, None] - places[None, :]
        seen = behind >= 0 if window_size is None else (behind >= 0) & (behind < window_size)
        mask = self._same & seen
        for bounds in _NOTING:
            bounds.note(mask, mx.maximum(self._begins(), _first_seen(length, window_size)))
        return mask

    def _begins(self) -> mx.array:
        """Return where the document of each position begins, (B, L); a document is contiguous."""
        places = mx.arange(1, self._pieces.shape[1], dtype=mx.int32)
        begins = mx.where(self._pieces[:, 1:] != self._pieces[:, :-1], places, 0)
        return mx.pad(mx.cummax(begins, axis=1), [(0, 0), (1, 0)])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the arguments: nothing is cached."""
        return keys, values


def apply(model: nn.Module, tokens: mx.array, marks: mx.array | None) -> mx.array:
    """Return a model's logits, (B, L, V).

    Args:
        model: of any architecture that mlx-lm knows; with marks, one with rotary positions (see `can_mask_documents`).
        tokens: (B, L) ids.
        marks: (B, L) document marks, see `data.token_file.Batch`; None to let a row's documents see each other.
    """
    return _run(model, tokens, marks, model)


def apply_body(model: nn.Module, tokens: mx.array, marks: mx.array | None) -> mx.array:
    """Return the hidden states that a model applies its head to, (B, L, D).

    Args:
        model: its body is the attribute `model`.
        tokens: see `apply`.
        marks: see `apply`.
    """
    return _run(model.model, tokens, marks, model)


def _run(module: nn.Module, tokens: mx.array, marks: mx.array | None, model: nn.Module) -> mx.array:
    caches = None
    if marks is not None:
        caches = [_PackedRows(marks >> 1, groups_heads=_groups_heads(model))] * len(model.layers)
    result: mx.array = module(tokens) if caches is None else module(tokens, cache=caches)
    return result


def _groups_heads(model: nn.Module) -> bool:
    """Return whether scores have an axis for key heads and one for the queries of each, as in Gemma 2."""
    layers = model.layers[0].modules() if len(model.layers) else []
    return any(hasattr(layer, "attn_logit_softcapping") and getattr(layer, "repeats", 1) > 1 for layer in layers)


def has_row_state(model: nn.Module) -> bool:
    """Return whether the structure alone shows that documents in a row cannot be kept apart; runs no forward pass.

    True for a table of absolute positions and for a recurrent layer. False does not mean that documents can be kept
    apart: `can_mask_documents` tries it.
    """
    from mlx_lm.models.cache import ArraysCache, make_prompt_cache

    caches = [part for cache in make_prompt_cache(model) for part in getattr(cache, "caches", [cache])]
    is_recurrent = any(isinstance(cache, ArraysCache) for cache in caches)
    return is_recurrent or any(path.endswith("wpe") for path, _ in model.named_modules())


#: Its block gets a function that evaluates the forward passes of the block.
Passes = Callable[[], AbstractContextManager[Callable[[], None]]]


def _unstreamed() -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


class _TokenFacts(Protocol):
    @property
    def has_conversations(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...


def masks_conversations(model: nn.Module, tokens: _TokenFacts, *, passes: Passes | None = None) -> bool:
    """Return whether documents are kept apart by default: if there are conversations and the model supports it.

    Args:
        model: see `can_mask_documents`.
        tokens: a `TokenFile`.
        passes: see `can_mask_documents`.
    """
    return tokens.has_conversations and can_mask_documents(model, tokens.vocab_size, passes=passes)


def can_mask_documents(model: nn.Module, vocab_size: int, *, passes: Passes | None = None) -> bool:
    """Return whether documents packed into one row get the same logits as each document alone.

    Decided by forward passes on a few tokens, without matrices and in fp32 (`copying_products`): models with learned
    absolute positions or recurrent layers fail, and no rounding makes another one fail.

    Args:
        model: to run.
        vocab_size: number of ids.
        passes: of a model whose blocks are read when they are needed, see `StreamedModel.passes`; None for another one.
    """
    was_training = model.training
    model.eval()
    tokens = mx.stack([mx.arange(first, first + 12) % vocab_size for first in (1, 2, 3)])
    ends = (5, 3, 8)  # of the first document in each row; a mask that fits one row alone fails with several
    marks = mx.array([[2] * end + [4] * (12 - end) for end in ends])
    try:
        with (passes or _unstreamed)() as evaluate, copying_products(in_fp32=True):
            packed = apply(model, tokens, marks)
            rows = [(tokens[row : row + 1], end) for row, end in enumerate(ends)]
            alone = mx.concatenate(
                [mx.concatenate([model(row[:, :end]), model(row[:, end:])], axis=1) for row, end in rows], axis=0
            )
            evaluate()
        difference = mx.abs(packed - alone).max() / mx.abs(alone).max()
        are_equal = float(difference) < 0.05  # another position differs by about 1
    except (AttributeError, TypeError, ValueError):
        are_equal = False
    model.train(was_training)
    return bool(are_equal)
