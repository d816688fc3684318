"""A model cut into its body, which gives hidden states, and the rest of its own call, which makes logits of them.

The rest works position by position: logits of a whole batch, (B, L, V), need not exist at once. It is the model's own
code, so a cap, a scale, a bias or a masked column of its logits stays what it is. The cut is found by running the
model on a few tokens, not by its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import document_mask, patching

# How deep below the model a body may lie: `language_model.model` is 2
_DEEPEST = 3

# Tokens of the pass that shows where the body is, and the position from which its second half begins
_TOKENS, _HALF = 8, 3

# Between the same product of few and of many rows; bf16 differs by 0.01, other hidden states by about 1
_TOLERANCE = 0.05


class Body:
    """Where a model's hidden states are; for a model without such a module, its logits take their place.

    Args:
        model: in evaluation mode.
        path: of the module that returns the hidden states; None for a model without such.
    """

    def __init__(self, model: nn.Module, path: str | None) -> None:
        self.path = path
        self._model = model
        self._module = None if path is None else _Replaceable(dict(model.named_modules())[path])

    @classmethod
    def of(cls, model: nn.Module) -> "Body":
        """Find the body of a model by a pass on a few tokens.

        Args:
            model: of any architecture; maps (B, L) ids to (B, L, V) logits.
        """
        for path in _candidates(model):
            body = cls(model, path)
            if body._is_one():
                return body
        return cls(model, None)

    def hidden(self, tokens: mx.array, marks: mx.array | None) -> mx.array:
        """Return hidden states, (B, L, D); the logits, (B, L, V), where no body is known.

        Args:
            tokens: (B, L) ids.
            marks: see `packed.apply`.
        """
        if self._module is None:
            return document_mask.apply(self._model, tokens, marks)
        with self._module.noting() as seen:
            document_mask.apply(self._model, tokens, marks)  # not evaluated: no logit is computed
            hidden: mx.array = seen.pop()
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits, (N, V), of hidden states, (N, D), in the model's type."""
        if self._module is None:
            return hidden
        with self._module.answering(hidden[None]):
            logits: mx.array = self._model(mx.zeros((1, len(hidden)), mx.int32))
        return logits.squeeze(0)

    def _is_one(self) -> bool:
        """Return whether logits follow from what the module returns alone, and each position's from its own."""
        assert self._module is not None  # noqa: S101 - for the type checker
        tokens = mx.arange(1, _TOKENS + 1)[None] % 2
        try:
            with self._module.noting() as seen:
                logits = self._model(tokens)
                if len(seen) != 1 or seen[0] is logits or not _is_hidden(seen[0]):
                    return False
                hidden = seen.pop().squeeze(0)
            other = mx.random.normal(hidden.shape, key=mx.random.key(0)).astype(hidden.dtype)
            return _are_close(self.logits(hidden), logits.squeeze(0)) and _are_close(
                self.logits(other[_HALF:]), self.logits(other)[_HALF:]
            )
        except (AttributeError, IndexError, TypeError, ValueError):
            return False


def _is_hidden(result: Any) -> bool:
    return isinstance(result, mx.array) and result.ndim == 3 and result.shape[:2] == (1, _TOKENS)


def _are_close(one: mx.array, other: mx.array) -> bool:
    """Return whether logits are the same but for rounding; a column that is masked with infinity is the same."""
    first, second = one.astype(mx.float32), other.astype(mx.float32)
    if first.shape != second.shape:
        return False
    is_finite = mx.isfinite(first) & mx.isfinite(second)
    difference = mx.where(is_finite, mx.abs(first - second), 0.0).max()
    size = mx.where(is_finite, mx.abs(second), 0.0).max()
    masked = mx.array_equal(mx.where(is_finite, 0.0, first), mx.where(is_finite, 0.0, second), equal_nan=True)
    return bool(masked) and float(difference) <= _TOLERANCE * float(size)


def _candidates(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules that may be a body: those with modules of their own, the nearest to the model first.

    Single layers follow: where one module holds the blocks and the output layer, as in GPT-NeoX, its last norm is one.
    """
    level, layers = {"": model}, []
    for _ in range(_DEEPEST):
        children = {
            f"{path}.{name}" if path else name: child
            for path, module in level.items()
            for name, child in module.items()
            if isinstance(child, nn.Module)
        }
        level = {path: child for path, child in children.items() if child.children()}
        layers += [path for path in children if path not in level]
        yield from level
    yield from layers


class _Replaceable:
    """A module whose call can be replaced for a while; others of its class keep theirs."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._seen: list[Any] | None = None
        self._answer: mx.array | None = None
        kind, own = type(module), self

        def call(self: Any, *inputs: Any, **named: Any) -> Any:
            if own._answer is not None:
                return own._answer
            result = kind.__call__(self, *inputs, **named)
            if own._seen is not None:
                own._seen.append(result)
            return result

        self._replaced = type(kind.__name__, (kind,), {"__call__": call})

    @contextmanager
    def noting(self) -> Iterator[list[Any]]:
        """Give what the module returns, in the order of its calls, until the block ends."""
        self._seen = []
        try:
            with self._in_place():
                yield self._seen
        finally:
            self._seen = None

    @contextmanager
    def answering(self, result: mx.array) -> Iterator[None]:
        """Let the module return an array whatever it is given, until the block ends."""
        self._answer = result
        try:
            with self._in_place():
                yield
        finally:
            self._answer = None  # a class is garbage in a cycle, and arrays must not wait for its collection

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with patching.layer_classes([(self._module, self._replaced)], by=__name__):
            yield
