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

from mlxflow.kernels.choice import Choice
from mlxflow.kernels.fits import Fit
from mlxflow.kernels.likeness import likeness
from mlxflow.kernels.trials import may_fit, try_layer


def find_fits(model: nn.Module) -> list[tuple[nn.Module, Fit]]:
    """Return the layers that kernels could serve, and as what.

    Layers of one class with equal settings and shapes are tried once.

    Args:
        model: of any architecture; its weights are as before afterwards.
    """
    known: dict[Hashable, Fit | None] = {}
    seen: dict[int, Hashable] = {}
    found = []
    for _, module in model.named_modules():
        if not may_fit(module):
            continue
        key = likeness(module, seen)
        if key not in known:
            known[key] = try_layer(module)
        fit = known[key]
        if fit is not None:
            found.append((module, fit))
    return found


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
