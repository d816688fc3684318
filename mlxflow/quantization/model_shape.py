"""The sizes of a model on which the work of its quantization depends."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.evaluation.slices import num_heads
from mlxflow.quantization.plan import quantizable_layers

# Width of an attention head where a model does not name their number
_HEAD_WIDTH = 64


class ModelShape(NamedTuple):
    """The sizes of a model on which its quantization depends.

    Attributes:
        parameters: weights of the layers that can be quantized.
        blocks: the same within the blocks.
        num_blocks: of them.
        num_bytes: of all parameters.
        square_widths: sum over the layers of the squares of their widths.
        cubic_widths: of their cubes.
        distinct_cubes: the same with one layer of those that share their inputs.
        compensations: sum over the layers with inputs of their numbers of weights times their widths.
        hidden_size: D.
        widest: inputs of the widest layer.
        heads: of attention.
        largest: weights of the largest layer.
        vocab_size: V.
    """

    parameters: int
    blocks: int
    num_blocks: int
    num_bytes: int
    square_widths: float
    cubic_widths: float
    distinct_cubes: float
    compensations: float
    hidden_size: int
    widest: int
    heads: int
    largest: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int) -> "ModelShape":
        """Return the sizes of a dense model; its weights may be lazy."""
        shapes = {path: layer.weight.shape for path, layer in quantizable_layers(model).items()}
        sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        widths = [float(shape[-1]) for shape in shapes.values()]
        inside = [path for path in sizes if ".layers." in path or path.startswith("layers.")]
        return cls(
            parameters=sum(sizes.values()),
            blocks=sum(sizes[path] for path in inside),
            num_blocks=max(1, len(getattr(model, "layers", None) or [])),
            num_bytes=sum(value.nbytes for _, value in tree_flatten(model.parameters())),
            square_widths=sum(width**2 for width in widths),
            cubic_widths=sum(width**3 for width in widths),
            distinct_cubes=_distinct_cubes(shapes),
            compensations=_compensations(shapes),
            hidden_size=int(min(widths, default=1)),
            widest=int(max(widths, default=1)),
            heads=num_heads(model) or max(1, int(min(widths, default=1)) // _HEAD_WIDTH),
            largest=max(sizes.values(), default=0),
            vocab_size=vocab_size,
        )


# Layers that share their inputs with others of the same module, by the last part of their names
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _distinct_cubes(shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the sum of cubes of widths of inputs; those of layers not known to share them count by themselves."""
    widths = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition(".")
        widths[f"{module}." if name in _READERS else path] = float(shape[-1])
    return sum(width**3 for width in widths.values())


def _compensations(shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the sum of sizes times widths; without an embedding that is not the head as well."""
    lookups = {path for path in shapes if path.endswith("embed_tokens") and "lm_head" in shapes}
    return sum(float(math.prod(shape)) * shape[-1] for path, shape in shapes.items() if path not in lookups)
