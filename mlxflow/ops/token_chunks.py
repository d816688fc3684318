"""Feed-forward layers over some tokens at a time: memory that does not grow with the number of tokens.

A feed-forward layer treats each token alone, and its activations are the widest of a model: 32,768 tokens of Llama 3 8B
take 0.94 GB for each of six. Its gradient computes the forward pass of a chunk again, so nothing but the input is kept.
Unlike `mx.checkpoint` it needs no output of the forward pass: a layer that is itself recomputed then does not compute
its feed-forward part once more only to throw it away.
"""

import functools
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.ops.custom_function import custom_function

# Bytes of the widest activation of a chunk, and the fewest tokens: a product of fewer does not fill a GPU
_CHUNK_BYTES, _MIN_TOKENS = 1 << 27, 1024


def is_token_wise(layer: Any) -> bool:
    """Return whether a layer treats each token alone: it holds two or more matrices and nothing else but dropout."""
    if not isinstance(layer, nn.Module):
        return False
    leaves = [part for part in layer.modules() if not part.children()]
    matrices = [part for part in leaves if isinstance(part, nn.Linear | nn.QuantizedLinear)]
    others = [part for part in leaves if not isinstance(part, nn.Linear | nn.QuantizedLinear | nn.Dropout)]
    is_wide = matrices and max(map(_outputs, matrices)) > min(map(_outputs, matrices))
    return len(matrices) > 1 and not others and bool(is_wide) and _name_is_usual(layer)


def _name_is_usual(layer: nn.Module) -> bool:
    """Return whether a class is one of feed-forward layers: attention holds nothing but matrices, too."""
    return any("MLP" in kind.__name__ or "FeedForward" in kind.__name__ for kind in type(layer).__mro__)


def _outputs(matrix: nn.Module) -> int:
    return int(matrix.weight.shape[0])


@functools.cache
def by_chunks(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a feed-forward layer's class that computes many tokens in chunks."""

    def call(self: nn.Module, x: mx.array, *rest: Any, **named: Any) -> Any:
        most = chunk_tokens(self, x.dtype)
        if rest or named or x.ndim != 3 or x.shape[0] * x.shape[1] <= most or drops_out(self):
            return plain.__call__(self, x, *rest, **named)
        weights: list[tuple[str, mx.array]] = tree_flatten(self.trainable_parameters())
        names = [name for name, _ in weights]

        def forward(x: mx.array, *values: mx.array) -> mx.array:
            self.update(tree_unflatten(list(zip(names, values, strict=True))))
            return cast("mx.array", plain.__call__(self, x))

        tokens = x.reshape(1, -1, x.shape[-1])
        result = _in_chunks(forward, most)(tokens, *(value for _, value in weights))
        self.update(tree_unflatten(weights))
        return result.reshape(*x.shape[:-1], result.shape[-1])

    return type(f"Chunked{plain.__name__}", (plain,), {"__call__": call})


def chunk_tokens(layer: nn.Module, dtype: mx.Dtype) -> int:
    """Return the tokens of a chunk.

    Args:
        layer: for which `is_token_wise` is true.
        dtype: of the activations.
    """
    matrices = [part for part in layer.modules() if isinstance(part, nn.Linear | nn.QuantizedLinear)]
    tokens = _CHUNK_BYTES // (max(map(_outputs, matrices)) * dtype.size)
    return int(max(_MIN_TOKENS, tokens // _MIN_TOKENS * _MIN_TOKENS))


def drops_out(layer: nn.Module) -> bool:
    """Return whether dropout draws random numbers: what is computed twice would draw others."""
    return any(isinstance(part, nn.Dropout) and part.training and part._p_1 < 1 for part in layer.modules())


def _in_chunks(forward: Any, most: int) -> Any:
    """Return a function of tokens (1, T, D) and weights, chunk after chunk, that keeps nothing for its gradient.

    Chunks of the gradient are smaller, since it holds more activations of a chunk.
    """

    def chunks(x: mx.array, most: int) -> list[slice]:
        return [slice(begin, begin + most) for begin in range(0, x.shape[1], most)]

    @custom_function
    def function(x: mx.array, *weights: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for tokens in chunks(x, most):
            part = mx.depends([x[:, tokens]], [parts[-1]])[0] if parts else x[:, tokens]
            parts.append(forward(part, *weights))
        return mx.concatenate(parts, axis=1)

    @function.vjp
    def gradients(primals: Any, incoming: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *weights = primals if isinstance(primals, tuple | list) else (primals,)
        parts: list[mx.array] = []
        sums = [mx.zeros(weight.shape, mx.float32) for weight in weights]
        for tokens in chunks(x, max(_MIN_TOKENS, most * 3 // 4)):
            before = [incoming, *parts[-1:], *sums]
            part = mx.depends([x[:, tokens]], before)[0]
            found = mx.vjp(forward, [part, *weights], [incoming[:, tokens]])[1]
            parts.append(found[0])
            sums = [total + other.astype(mx.float32) for total, other in zip(sums, found[1:], strict=True)]
        of_weights = [total.astype(weight.dtype) for total, weight in zip(sums, weights, strict=True)]
        # depends: the gradients of the weights are computed before the next layer's, and what they take is freed
        return *mx.depends([mx.concatenate(parts, axis=1)], [parts[-1], *of_weights]), *of_weights

    return function
