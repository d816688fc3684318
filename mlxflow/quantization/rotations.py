"""Rotations of a model's weights that leave its outputs as they are and spread outliers over all channels.

R1 rotates the residual stream: the weights of norms are folded into the layers that read them, then the embedding and
all layers that write to the stream are multiplied by an orthogonal matrix, and those that read it by its transpose. R2
rotates the values within each head of attention, between the value and the output projection. Both are folded into
neighbouring weights and cost nothing at run time (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al.
2024, arXiv:2405.16406). The matrices are random Hadamard matrices.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.ops.row_slices import by_rows

# Layers of a block by the last part of their names: they read the residual stream, or write to it
_READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "gate")
_WRITERS = ("o_proj", "down_proj")

# The norms of a block whose outputs are only read by layers
_NORMS = ("input_layernorm", "post_attention_layernorm")

# Relative difference up to which the weights of a norm are one number
_SAME = 1e-6


class Rotation(NamedTuple):
    """A rotation of a model.

    Attributes:
        seed: of the random matrices.
        residual: whether the residual stream is rotated (R1).
        heads: whether the values of each head are rotated (R2).
    """

    seed: int
    residual: bool
    heads: bool

    def apply(self, model: nn.Module, *, dtype: mx.Dtype | None = None) -> None:
        """Rotate the weights of a model in place, lazily.

        Args:
            model: dense; of an architecture that `obstacles` allows.
            dtype: of the rotated weights; None for the model's.
        """
        random = np.random.default_rng(self.seed)
        if self.residual:
            _rotate_residual(model, hadamard(model.model.embed_tokens.weight.shape[-1], random), dtype)
        for block in model.layers if self.heads else ():
            _rotate_heads(block.self_attn, hadamard(_head_sizes(block.self_attn)[2], random), dtype)


class Obstacles(NamedTuple):
    """Why a model cannot be rotated, in words; empty if it can.

    Attributes:
        residual: of R1.
        heads: of R2.
    """

    residual: str
    heads: str


def obstacles(model: nn.Module) -> Obstacles:
    """Return why a model cannot be rotated, by the names, classes and shapes of its layers.

    Args:
        model: dense; of its weights only those of the last norm may be read.
    """
    return Obstacles(next(_residual_obstacles(model), ""), next(_head_obstacles(model), ""))


def hadamard(size: int, random: np.random.Generator) -> mx.array:
    """Return an orthogonal matrix, (N, N), in fp32: a Hadamard matrix with random signs.

    For a size that is no power of two it is the product (Kronecker's) of one for the power of two in it and a random
    orthogonal matrix.

    Args:
        size: N.
        random: its source of signs.
    """
    power = size & -size
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    odd, _ = np.linalg.qr(random.normal(size=(size // power, size // power)))
    matrix = np.kron(odd, matrix / np.sqrt(power))
    return mx.array((matrix * random.choice([-1.0, 1.0], size)[:, None]).astype(np.float32))


def _residual_obstacles(model: nn.Module) -> Iterator[str]:
    body = getattr(model, "model", None)
    blocks = getattr(model, "layers", None)
    if not isinstance(body, nn.Module) or not isinstance(blocks, list) or not blocks:
        yield "it has no list of blocks in a module `model`"
        return
    for name in ("embed_tokens", "norm"):
        if not isinstance(getattr(body, name, None), nn.Module):
            yield f"it has no `model.{name}`"
            return
    yield from _layer_obstacles(model)
    for number, block in enumerate(blocks):
        if any(name not in block for name in ("self_attn", *_NORMS)) or len(_feed_forward(block)) != 1:
            yield f"block {number} is not attention and one feed-forward part, each after a norm"
    if "lm_head" not in model and not _is_constant(body.norm):
        yield "its head is the embedding, and the weights of model.norm cannot be folded into one of them alone"


def _layer_obstacles(model: nn.Module) -> Iterator[str]:
    """Yield layers that are not known to read or to write the residual stream, and norms that cannot be folded."""
    for path, module in model.named_modules():
        if "weight" not in module:
            continue
        name = path.rpartition(".")[2]
        is_norm = module.weight.ndim == 1
        if is_norm and "bias" in module:
            yield f"{path} subtracts the mean, which a rotation changes"
        elif is_norm and not _is_inside(path) and name not in (*_NORMS, "norm"):
            yield f"{path} is a norm of what a layer writes"
        elif not is_norm and name not in (*_READERS, *_WRITERS, "embed_tokens", "lm_head"):
            yield f"{path} is not known to read or to write the residual stream"


def _head_obstacles(model: nn.Module) -> Iterator[str]:
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not blocks:
        yield "it has no list of blocks"
        return
    for number, block in enumerate(blocks):
        attention: Any = getattr(block, "self_attn", None)
        for name in ("v_proj", "o_proj"):
            if type(getattr(attention, name, None)) is not nn.Linear:
                yield f"block {number} has no linear layer `self_attn.{name}`"
                return
        num_heads, _, size = _head_sizes(attention)
        if not size or attention.o_proj.weight.shape[1] != num_heads * size:
            yield f"the heads of block {number} are not {num_heads} times {size} wide"


def _feed_forward(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block besides attention and norms: one in the usual architectures."""
    return [part for name, part in block.children().items() if name not in ("self_attn", *_NORMS) and part]


def _is_inside(path: str) -> bool:
    """Return whether a module is part of attention, whose queries and keys may have norms of their own."""
    return ".self_attn." in path


def _is_constant(norm: nn.Module) -> bool:
    weight = norm.weight.astype(mx.float32)
    return bool(mx.abs(weight - weight.mean()).max() <= _SAME * mx.abs(weight).max())


def _head_sizes(attention: Any) -> tuple[int, int, int]:
    """Return the numbers of heads and of key heads, and the width of a value; 0 for what is not known."""
    num_heads = getattr(attention, "n_heads", 0) or getattr(attention, "num_heads", 0)
    num_kv_heads = getattr(attention, "n_kv_heads", 0) or getattr(attention, "num_key_value_heads", 0) or num_heads
    width = attention.v_proj.weight.shape[0]
    return num_heads, num_kv_heads, width // num_kv_heads if num_kv_heads and width % num_kv_heads == 0 else 0


def _rotate_residual(model: nn.Module, matrix: mx.array, dtype: mx.Dtype | None) -> None:
    body = model.model
    _rotate_reader(body.embed_tokens, matrix, mx.ones(len(matrix)), dtype)
    for block in model.layers:
        for name, module in block.named_modules():
            last = name.rpartition(".")[2]
            if "weight" in module and module.weight.ndim > 1 and last in _WRITERS:
                _rotate_writer(module, matrix, dtype)
        parts = (block.self_attn, block.input_layernorm), (_feed_forward(block)[0], block.post_attention_layernorm)
        for part, norm in parts:
            readers = [
                module
                for name, module in part.named_modules()
                if "weight" in module and module.weight.ndim > 1 and name.rpartition(".")[2] in _READERS
            ]
            factors = _removed_factors(norm)
            for reader in readers:
                _rotate_reader(reader, matrix, factors, dtype)
    if "lm_head" in model:
        _rotate_reader(model.lm_head, matrix, _removed_factors(body.norm), dtype)


def _rotate_writer(layer: nn.Module, matrix: mx.array, dtype: mx.Dtype | None) -> None:
    """Rotate what a layer writes to the residual stream."""
    layer.weight = (matrix.T @ layer.weight.astype(mx.float32)).astype(dtype or layer.weight.dtype)
    if "bias" in layer:
        layer.bias = (layer.bias.astype(mx.float32) @ matrix).astype(layer.bias.dtype)


def _rotate_reader(layer: nn.Module, matrix: mx.array, factors: mx.array, dtype: mx.Dtype | None) -> None:
    """Multiply the columns of a layer by the factors of the norm before it, and rotate what it reads."""
    kind = dtype or layer.weight.dtype

    def rotated(rows: mx.array) -> mx.array:
        folded = (rows.astype(mx.float32) * factors).astype(kind)
        product: mx.array = (folded.astype(mx.float32) @ matrix).astype(kind)
        return product

    layer.weight = by_rows(rotated, layer.weight, width=len(factors))


def _removed_factors(norm: nn.Module) -> mx.array:
    """Return the factors of a norm, (D,), which has none afterwards."""
    adds_one = _adds_one(norm)
    factors: mx.array = norm.weight.astype(mx.float32) + (1.0 if adds_one else 0.0)
    norm.weight = (mx.zeros_like if adds_one else mx.ones_like)(norm.weight)
    return factors


def _adds_one(norm: nn.Module) -> bool:
    """Return whether a norm multiplies by one plus its weight, as in Gemma."""
    x = mx.array(np.random.default_rng(0).normal(size=norm.weight.shape).astype(np.float32))
    y = norm(x).astype(mx.float32) / (x * mx.rsqrt(x.square().mean()))
    weight = norm.weight.astype(mx.float32)
    return bool(mx.abs(y - weight).max() > mx.abs(y - 1 - weight).max())


def _rotate_heads(attention: Any, matrix: mx.array, dtype: mx.Dtype | None) -> None:
    num_heads, num_kv_heads, size = _head_sizes(attention)
    value, output = attention.v_proj, attention.o_proj
    rows = value.weight.astype(mx.float32).reshape(num_kv_heads, size, -1)
    value.weight = (matrix.T @ rows).reshape(value.weight.shape).astype(dtype or value.weight.dtype)
    if "bias" in value:
        bias = value.bias.astype(mx.float32).reshape(num_kv_heads, size) @ matrix
        value.bias = bias.reshape(-1).astype(value.bias.dtype)
    columns = output.weight.astype(mx.float32).reshape(-1, num_heads, size) @ matrix
    output.weight = columns.reshape(output.weight.shape).astype(dtype or output.weight.dtype)


def logits_difference(
    dense: Callable[[mx.array], mx.array], rotated: Callable[[mx.array], mx.array], tokens: mx.array
) -> float:
    """Return the largest difference of two models' logits, by the largest logit if that is over 1.

    Args:
        dense: the model in fp32; maps (B, L) ids to (B, L, V) logits.
        rotated: the same for the rotated one.
        tokens: (B, L) ids.
    """
    exact, other = (one(tokens).astype(mx.float32) for one in (dense, rotated))
    return float(mx.abs(exact - other).max()) / max(1.0, float(mx.abs(exact).max()))
