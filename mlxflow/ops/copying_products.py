"""Forward passes that test how a model is built, without the cost of its weights.

Whether logits are one product, or which module returns the hidden states, depends on the way of arrays through a model,
not on the numbers in its matrices. Multiplying with them takes seconds for each GB of weights, and with packed codes on
the CPU more than a minute.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching


@contextmanager
def copying_products() -> Iterator[None]:
    """Let linear layers and tied heads return numbers of their inputs until the block ends.

    Result j of a position is its input j modulo the width: it depends on this position alone, as a product does.
    Adapters and everything else compute as usual.
    """
    dora: Any = sys.modules.get("mlx_lm.tuner.dora")  # it dequantizes its base; not imported for that
    layers = [nn.Linear, nn.QuantizedLinear]
    heads = [nn.Embedding, nn.QuantizedEmbedding]
    changes = [(layer, "__call__", _copy(lambda layer: layer)) for layer in layers]
    changes += [(head, "as_linear", _copy(lambda layer: layer)) for head in heads]
    if dora is not None:
        changes += [(dora.DoRALinear, "__call__", _copy(lambda layer: layer.linear))]
    with patching.attributes(*changes, by=__name__):
        yield


def _copy(base: Callable[[Any], Any]) -> Callable[[Any, mx.array], mx.array]:
    """Return what replaces a product; `base` returns the layer with the weight."""

    def copied(layer: Any, x: mx.array) -> mx.array:
        return mx.take(x, mx.arange(base(layer)["weight"].shape[0]) % x.shape[-1], axis=-1)

    return copied
