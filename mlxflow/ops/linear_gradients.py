"""Linear layers whose weight gradient has the weight's memory layout, and embeddings with a deterministic gradient.

MLX's gradient of `x @ w.T` with respect to w is laid out transposed to w and is copied before the update reads it: for
every matrix, in every step. For layers that read the same array, such as the projections to queries, keys and values,
MLX also adds up the gradients of that array in extra passes; concatenated, they take one product.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.embedding_lookup import lookup
from mlxflow.ops.eval_mode import evaluating


def find_siblings(model: nn.Module, tokens: mx.array) -> list[tuple[nn.Linear, ...]]:
    """Return groups of a model's linear layers that read the same array and are called one after another.

    Only groups for which concatenating the gradients of the outputs is cheaper than adding those of the input are
    returned. Layers with a bias or an adapter are left out.

    Args:
        model: called once in eval mode; nothing is evaluated.
        tokens: (B, L) ids for that call.
    """
    calls: list[tuple[nn.Linear, mx.array]] = []
    plain = nn.Linear.__call__

    def noted(layer: Any, x: mx.array) -> Any:
        calls.append((layer, x))
        return plain(layer, x)

    with patching.attributes((nn.Linear, "__call__", noted), by=__name__), evaluating(model):
        model(tokens)
    times = Counter(id(layer) for layer, _ in calls)
    groups = [tuple(layer for layer, _ in group) for _, group in itertools.groupby(calls, key=lambda call: id(call[1]))]
    return [group for group in groups if _pays(group) and all(times[id(layer)] == 1 for layer in group)]


def _pays(group: Sequence[nn.Linear]) -> bool:
    if len(group) < 2 or any(type(layer) is not nn.Linear or "bias" in layer for layer in group):
        return False
    shapes = [layer.weight.shape for layer in group]
    is_of_one_type = len({layer.weight.dtype for layer in group}) == 1
    return is_of_one_type and sum(rows for rows, _ in shapes) <= 2 * (len(group) - 1) * shapes[0][1]


@contextmanager
def replaced_products(siblings: Sequence[tuple[nn.Linear, ...]] = ()) -> Iterator[None]:
    """Replace the products of linear layers, and of embeddings used as heads, by those of this module.

    A function that is traced while the context is open keeps the replacement.

    Args:
        siblings: groups from `find_siblings`.
    """
    linear, head = nn.Linear.__call__, nn.Embedding.as_linear
    first_of = {id(group[0]): group for group in siblings}
    waiting: dict[int, tuple[mx.array, mx.array]] = {}

    def as_product(layer: Any, x: mx.array) -> mx.array:
        given, result = waiting.pop(id(layer), (None, None))
        if result is not None and given is x:
            return result
        group = first_of.get(id(layer), ())
        if group and all(_is_supported(x, member["weight"]) for member in group):
            products = cast("list[mx.array]", _products(x, *(member["weight"] for member in group)))
            waiting.update({id(member): (x, product) for member, product in zip(group, products, strict=True)})
            return waiting.pop(id(layer))[1]
        if not _is_supported(x, layer["weight"]):
            return cast("mx.array", linear(layer, x))
        if "bias" in layer:
            return cast("mx.array", _product_and_sum(x, layer["weight"], layer["bias"]))
        return product(x, layer["weight"])

    def as_head(layer: Any, x: mx.array) -> mx.array:
        weight = layer["weight"]
        return product(x, weight) if _is_supported(x, weight) else cast("mx.array", head(layer, x))

    changes = (nn.Linear, "__call__", as_product), (nn.Embedding, "as_linear", as_head)
    with patching.attributes(*changes, by=__name__):
        yield


@contextmanager
def ordered_lookups() -> Iterator[None]:
    """Make the gradient of embeddings traced in this block deterministic, see `mlxflow.ops.embedding_lookup`."""

    def ordered(layer: Any, numbers: mx.array) -> mx.array:
        return lookup(layer["weight"], numbers)

    with patching.attributes((nn.Embedding, "__call__", ordered), by=__name__):
        yield


def _is_supported(x: mx.array, weight: mx.array) -> bool:
    return x.ndim > 1 and x.dtype == weight.dtype


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Return `x @ weight.T` for x (..., D) and weight (N, D) of one type."""
    return cast("mx.array", _product(x, weight))


@custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_product.vjp
def _product_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    return cotangent @ weight, _rows(cotangent).T @ _rows(x)


@custom_function
def _products(x: mx.array, *weights: mx.array) -> list[mx.array]:
    return [x @ weight.T for weight in weights]


@_products.vjp
def _products_vjp(primals: tuple[mx.array, ...], cotangents: list[mx.array], _: list[mx.array]) -> tuple[mx.array, ...]:
    x, *weights = primals
    incoming = mx.concatenate(cotangents, axis=-1)
    ends = list(itertools.accumulate(len(weight) for weight in weights))
    gradients = mx.split(_rows(incoming).T @ _rows(x), ends[:-1])
    return (incoming @ mx.concatenate(weights), *gradients)


@custom_function
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
