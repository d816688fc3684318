"""Linear layers whose weight's gradient comes as the weight lies in memory, and embeddings that are summed in order.

MLX's gradient of `x @ w.T` is a product that lies transposed to w, and is copied before the update reads it: for every
matrix, in every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.lookup import lookup


@contextmanager
def own_products() -> Iterator[None]:
    """Let linear layers, and embeddings as heads, that are traced in this block compute their gradients our way."""
    linear, head = nn.Linear.__call__, nn.Embedding.as_linear

    def as_product(layer: Any, x: mx.array) -> mx.array:
        if not _serves(x, layer["weight"]):
            return cast("mx.array", linear(layer, x))
        if "bias" in layer:
            return cast("mx.array", _product_and_sum(x, layer["weight"], layer["bias"]))
        return product(x, layer["weight"])

    def as_head(layer: Any, x: mx.array) -> mx.array:
        weight = layer["weight"]
        return product(x, weight) if _serves(x, weight) else cast("mx.array", head(layer, x))

    nn.Linear.__call__, nn.Embedding.as_linear = as_product, as_head
    try:
        yield
    finally:
        nn.Linear.__call__, nn.Embedding.as_linear = linear, head


@contextmanager
def ordered_lookups() -> Iterator[None]:
    """Let embeddings that are traced in this block have a gradient that is the same every time: `mlxflow.lookup`."""
    plain = nn.Embedding.__call__
    nn.Embedding.__call__ = lambda layer, numbers: lookup(layer["weight"], numbers)
    try:
        yield
    finally:
        nn.Embedding.__call__ = plain


def _serves(x: mx.array, weight: mx.array) -> bool:
    return x.ndim > 1 and x.dtype == weight.dtype


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Return `x @ weight.T` for x (..., D) and weight (N, D) of one type."""
    return cast("mx.array", _product(x, weight))


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_product.vjp
def _product_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    return cotangent @ weight, _rows(cotangent).T @ _rows(x)


@mx.custom_function
def _product_and_sum(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_product_and_sum.vjp
def _product_and_sum_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, bias = primals
    incoming = _rows(cotangent)
    return cotangent @ weight, incoming.T @ _rows(x), incoming.sum(axis=0).astype(bias.dtype)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
