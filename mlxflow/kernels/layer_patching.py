"""Gives the layers of a model the kernels for training, by what they compute and not by what they are called.

A layer is tried on random inputs: what returns the root-mean-square norm of its input, the down projection of a gated
activation, its input turned by the angles of its positions, or rows of its weight, is given a class of its own that
inherits from its class. So is a block of which a trial with stand-ins for its layers shows what it adds to what.
Parameters keep their names; adapters, fake quantization and quantized weights within a layer go on as they were. Undone
when the block ends.
"""

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlxflow.kernels import cache
from mlxflow.kernels.layer_patterns import Fit
from mlxflow.kernels.layer_signature import Telling, Untold, alike, sources
from mlxflow.kernels.pattern_detection import may_fit, try_layer
from mlxflow.kernels.registry import Choice, environment


def find_fits(model: nn.Module) -> list[tuple[nn.Module, Fit]]:
    """Return the layers that kernels could serve, and as what.

    Of layers of one class with equal settings and shapes one is tried, unless what came out is kept in the user's
    cache, under all that it follows from: the device, MLX, our sources and the layer's own.

    Args:
        model: of any architecture; its weights are as before afterwards.
    """
    groups = [group for group in alike(model) if may_fit(group[0])]
    keys = _keys([group[0] for group in groups])
    kept, new, found = cache.read(), {}, []
    for group, key in zip(groups, keys, strict=True):
        try:
            fit = msgspec.convert(kept[key or ""], Fit | None)
        except (KeyError, msgspec.ValidationError):
            fit, is_lasting = try_layer(group[0])
            if key is not None and is_lasting:
                new[key] = msgspec.to_builtins(fit)
        if fit is not None:
            found += [(module, fit) for module in group]
    if new:
        cache.keep(new)
    return found


def _keys(layers: list[nn.Module]) -> list[str | None]:
    """Return what findings about layers are kept under; None for one of which nothing can be said elsewhere."""
    telling = Telling()
    texts = [_told(layer, telling) for layer in layers]
    try:
        where = (environment(), sources(telling.modules))
    except (Untold, OSError):
        return [None] * len(layers)
    return [None if text is None else cache.key_of("layer", *where, text) for text in texts]


def _told(layer: nn.Module, telling: Telling) -> str | None:
    try:
        return telling.told(layer)
    except Untold:
        return None


@contextmanager
def fitted(fits: list[tuple[nn.Module, Fit]], choice: Choice, dtype: mx.Dtype) -> Iterator[None]:
    """Let layers compute with the kernels that serve, until the block ends. Begin before a step is compiled.

    Args:
        fits: of `find_fits`.
        choice: which kernels serve.
        dtype: in which the model computes.
    """
    chosen = [(module, fit) for module, fit in fits if choice.serves(fit.name(module, dtype))]
    plain = [type(module) for module, _ in chosen]
    for module, fit in chosen:
        module.__class__ = _fitting(cast("Hashable", type(module)), fit, dtype)
    try:
        yield
    finally:
        for (module, _), kind in zip(chosen, plain, strict=True):
            module.__class__ = kind


@functools.cache
def _fitting(plain: type[nn.Module], fit: Fit, dtype: mx.Dtype) -> type[nn.Module]:
    return type(f"Fitted{plain.__name__}", (plain,), {"__call__": fit.call(plain, dtype)})
