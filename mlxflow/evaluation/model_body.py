"""Split a model into its body, which returns hidden states, and its head, which computes logits from them.

The head works position by position: the logits of a whole batch, (B, L, V), need not exist at once. It is the model's
own code, so a cap, a scale, a bias or a masked column of the logits is kept. The body is found by running the model on
a few tokens, not by its name.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.ops import attention_overrides, document_mask, patching
from mlxflow.ops.copying_products import copying_products

# Largest depth of a body below the model: `language_model.model` is 2
_DEEPEST = 3

# Tokens of the test pass, and the position from which its second half begins
_TOKENS, _HALF = 8, 3

# Relative difference allowed between equal products of few and of many rows: bf16 differs by 0.01, others by about 1
_TOLERANCE = 0.05


class Body:
    """The body and the head of a model; if no body is known, its logits take the place of hidden states.

    Args:
        model: in eval mode.
        path: of the module that returns the hidden states; None if there is none.
        streamed: the model, if its blocks are read when they are needed.
    """

    def __init__(self, model: nn.Module, path: str | None, streamed: StreamedModel | None = None) -> None:
        self.path = path
        self.streamed = streamed
        self._model = model
        self._module = None if path is None else _Replaceable(dict(model.named_modules())[path])

    @classmethod
    def of(cls, model: nn.Module | StreamedModel) -> "Body":
        """Find the body of a model by forward passes on a few tokens.

        Args:
            model: of any architecture; maps (B, L) ids to (B, L, V) logits.
        """
        streamed = model if isinstance(model, StreamedModel) else None
        whole = model.model if isinstance(model, StreamedModel) else model
        with copying_products():
            for path in _candidates(whole):
                body = cls(whole, path, streamed)
                if body._is_one():
                    return body
        return cls(whole, None, streamed)

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._model

    def passes(self) -> AbstractContextManager[Callable[[], None]]:
        """Record forward passes of a streamed model; see `StreamedModel.passes`. Does nothing for other models."""
        return nullcontext(lambda: None) if self.streamed is None else self.streamed.passes()

    def hidden(self, tokens: mx.array, marks: mx.array | None) -> mx.array:
        """Return hidden states, (B, L, D); the logits, (B, L, V), if no body is known.

        Args:
            tokens: (B, L) ids.
            marks: see `document_mask.apply`.
        """
        if self._module is None:
            with attention_overrides.in_evaluation():
                return document_mask.apply(self._model, tokens, marks)
        with self._module.noting() as seen, attention_overrides.in_evaluation():
            document_mask.apply(self._model, tokens, marks)  # not evaluated: no logit is computed
            hidden: mx.array = seen.pop()
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits, (N, V), of hidden states, (N, D), in the model's dtype."""
        if self._module is None:
            return hidden
        with self._module.answering(hidden[None]):
            logits: mx.array = self._model(mx.zeros((1, len(hidden)), mx.int32))
        return logits.squeeze(0)

    def _is_one(self) -> bool:
        """Return whether logits depend only on the module's result, and each position's only on its own."""
        assert self._module is not None  # noqa: S101 - for the type checker
        tokens = mx.arange(1, _TOKENS + 1)[None] % 2
        try:
            with self.passes() as evaluate, self._module.noting() as seen:
                logits = self._model(tokens)
                evaluate()
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


def _are_close(logits: mx.array, other: mx.array) -> bool:
    """Return whether logits are equal up to rounding; columns that are masked with infinity must be the same."""
    first, second = logits.astype(mx.float32), other.astype(mx.float32)
    if first.shape != second.shape:
        return False
    is_finite = mx.isfinite(first) & mx.isfinite(second)
    difference = mx.where(is_finite, mx.abs(first - second), 0.0).max()
    size = mx.where(is_finite, mx.abs(second), 0.0).max()
    masked = mx.array_equal(mx.where(is_finite, 0.0, first), mx.where(is_finite, 0.0, second), equal_nan=True)
    return bool(masked) and float(difference) <= _TOLERANCE * float(size)


def _candidates(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules that may be a body: first those with submodules, the nearest to the model first.

    Single layers follow: in GPT-NeoX one module holds the blocks and the output layer, and its last norm is the body.
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
    """A module whose call can be observed or replaced; other modules of its class keep theirs."""

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
        """Collect what the module returns, in the order of its calls, until the block ends."""
        self._seen = []
        try:
            with self._in_place():
                yield self._seen
        finally:
            self._seen = None

    @contextmanager
    def answering(self, result: mx.array) -> Iterator[None]:
        """Make the module return an array for any arguments, until the block ends."""
        self._answer = result
        try:
            with self._in_place():
                yield
        finally:
            self._answer = None  # the class is part of a reference cycle: arrays would live until its collection

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with patching.layer_classes([(self._module, self._replaced)], by=__name__):
            yield
