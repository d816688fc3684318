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
def copying_products(*, in_fp32: bool = False) -> Iterator[None]:
    """Let linear layers and tied heads return numbers of their inputs until the block ends.

    Result j of a position is its input j modulo the width: it depends on this position alone, as a product does.
    Adapters of matrices add nothing: with 16-bit numbers their products take milliseconds each on the CPU. Everything
    else computes as usual.

    Args:
        in_fp32: embeddings return fp32, and what follows is computed in it: in 16 bits a pretrained model's results may
            differ by half of themselves between two orders of the same sums.
    """
    layers = [nn.Linear, nn.QuantizedLinear]
    heads = [nn.Embedding, nn.QuantizedEmbedding]
    changes = [(layer, "__call__", _copy(lambda layer: layer)) for layer in layers]
    changes += [(head, "as_linear", _copy(lambda layer: layer)) for head in heads]
    changes += [(kind, "__call__", _copy(lambda layer: layer.linear)) for kind in _adapter_kinds()]
    if in_fp32:
        changes += [(head, "__call__", _wide(head.__call__)) for head in heads]
    with patching.attributes(*changes, by=__name__):
        yield


def _wide(plain: Callable[[Any, mx.array], mx.array]) -> Callable[[Any, mx.array], mx.array]:
    def looked_up(layer: Any, tokens: mx.array) -> mx.array:
        return plain(layer, tokens).astype(mx.float32)

    return looked_up


def _adapter_kinds() -> list[Any]:
    """Return mlx-lm's layers of an adapter beside a matrix; its modules are not imported for that."""
    names = {"mlx_lm.tuner.lora": "LoRALinear", "mlx_lm.tuner.dora": "DoRALinear"}
    return [getattr(sys.modules[module], kind) for module, kind in names.items() if module in sys.modules]


def _copy(base: Callable[[Any], Any]) -> Callable[[Any, mx.array], mx.array]:
    """Return what replaces a product; `base` returns the layer with the weight."""

    def copied(layer: Any, x: mx.array) -> mx.array:
        return mx.take(x, mx.arange(base(layer)["weight"].shape[0]) % x.shape[-1], axis=-1)

    return copied
