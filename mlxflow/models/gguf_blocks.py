"""Blocks of GGUF's tensor types: which of them hold MLX's codes unchanged, and how a matrix is encoded.

A block of Q4_1 has 32 codes, a scale and a minimum, as a group of MLX's mode "affine" has: w = scale * code + bias.
Codes of fewer bits, and larger groups, fit into the same blocks with the scale repeated. Q4_0, Q5_0 and Q8_0 have no
minimum: they hold affine codes whose bias is that of a symmetric grid, -2^(bits-1) * scale. Scales are fp16.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.models import quantized_layers
from mlxflow.storage.host_arrays import numpy_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Types that a matrix can be written in, with llama.cpp's number of the whole file's type.
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q6_k": 18,
    "bf16": 32,
    "mxfp4": 38,
}

_BLOCK = 32
_SUPER_BLOCK = 256
_DENSE = ("f32", "f16", "bf16")
_SYMMETRIC = {2: "q4_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 6: "q8_0", 8: "q8_0"}
_AFFINE = {2: "q4_1", 3: "q4_1", 4: "q4_1", 5: "q5_1"}


class Encoding(NamedTuple):
    """How a matrix is written.

    Attributes:
        type: one of `FILE_TYPES`.
        keeps_codes: whether MLX's codes are written as they are, only their scales in fp16.
    """

    type: str
    keeps_codes: bool


def choose(layer: nn.Module, requested: str, *, is_outer: bool, outer: str) -> Encoding:
    """Return how the weight of a layer is written.

    Args:
        layer: of the model, dense or quantized.
        requested: one of `FILE_TYPES`, or "auto": a quantized layer's codes where a type holds them, else q8_0; a dense
            layer in the 16 bits of its dtype.
        is_outer: whether it is the embedding or the head.
        outer: the type of these; "auto": that of the others, but q8_0 instead of fewer bits.
    """
    kept = _type_of_codes(layer) if quantized_layers.holds_codes(layer) else ""
    if is_outer and outer != "auto":
        requested = outer
    elif is_outer and requested not in ("auto", "q8_0", *_DENSE):
        requested = "q8_0"
    if requested == "auto":
        if quantized_layers.holds_codes(layer):
            return Encoding(kept or "q8_0", bool(kept))
        return Encoding("bf16" if layer.weight.dtype == mx.bfloat16 else "f16", keeps_codes=False)
    if kept == requested:
        return Encoding(kept, keeps_codes=True)
    return Encoding(_fitting(requested, _width(layer)), keeps_codes=False)


def _fitting(kind: str, width: int) -> str:
    """Return a type whose blocks divide a row of a matrix."""
    if kind == "q6_k" and width % _SUPER_BLOCK:
        kind = "q8_0"
    return "f16" if kind not in _DENSE and width % _BLOCK else kind


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    return int(weight.shape[-1] * 32 // layer.bits if "scales" in layer else weight.shape[-1])


def _type_of_codes(layer: nn.Module) -> str:
    """Return the type whose blocks hold the codes of a quantized layer; empty if none does."""
    if "scales" not in layer or _width(layer) % _BLOCK:
        return ""
    mode = getattr(layer, "mode", "affine")
    if mode != "affine":
        return "mxfp4" if mode == "mxfp4" else ""
    if not all(mx.isfinite(one.astype(mx.float16)).all().item() for one in (layer.scales, layer.biases)):
        return ""
    if mx.array_equal(layer.biases, layer.scales * -(2 ** (layer.bits - 1))).item():
        return _SYMMETRIC[layer.bits]
    return _AFFINE.get(layer.bits, "")


def encode(layer: nn.Module, encoding: Encoding, rows: "NDArray[np.intp] | None") -> "NDArray[Any]":
    """Return the weight of a layer in a type's form: uint8 (..., bytes of a row) for blocks and bf16, else floats.

    Args:
        layer: of the model.
        encoding: of `choose`.
        rows: the order in which the rows are written; None for their own.
    """
    if encoding.keeps_codes:
        return _kept_codes(layer, encoding.type, rows)
    weight = numpy_of(quantized_layers.dense_weight(layer).astype(mx.float32))
    return encode_floats(weight if rows is None else weight[rows], encoding.type)


def encode_floats(weight: "NDArray[Any]", kind: str) -> "NDArray[Any]":
    """Return floats, (..., N), in a type's form; see `encode`."""
    from gguf import GGMLQuantizationType, quantize

    if kind == "q6_k":
        return _q6_k(weight)
    encoded: NDArray[Any] = quantize(np.ascontiguousarray(weight, np.float32), GGMLQuantizationType[kind.upper()])
    return encoded


def _kept_codes(layer: nn.Module, kind: str, rows: "NDArray[np.intp] | None") -> "NDArray[Any]":
    """Return MLX's codes in the blocks of a type, (..., bytes of a row)."""
    if kind == "mxfp4":
        return _mxfp4(layer, rows)
    ones, zeros = mx.ones_like(layer.scales).astype(mx.float32), mx.zeros_like(layer.scales).astype(mx.float32)
    dense = mx.dequantize(layer.weight, ones, zeros, group_size=layer.group_size, bits=layer.bits)
    codes = numpy_of(dense).astype(np.int16)
    repeats = layer.group_size // _BLOCK
    scales, biases = (
        np.repeat(numpy_of(one.astype(mx.float32)), repeats, axis=-1) for one in (layer.scales, layer.biases)
    )
    if rows is not None:
        codes, scales, biases = codes[rows], scales[rows], biases[rows]
    blocks = codes.reshape(-1, _BLOCK)
    if kind in ("q4_0", "q5_0", "q8_0"):
        blocks = blocks - 2 ** (layer.bits - 1) + {"q4_0": 8, "q5_0": 16, "q8_0": 0}[kind]
    parts = [_halves(scales)] + ([_halves(biases)] if kind.endswith("_1") else [])
    if kind == "q8_0":
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        small = blocks.astype(np.uint8)
        if kind.startswith("q5"):
            parts.append(np.packbits(small >> 4, axis=-1, bitorder="little"))
        parts.append((small[:, : _BLOCK // 2] & 15) | ((small[:, _BLOCK // 2 :] & 15) << 4))
    return np.concatenate(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def _halves(values: "NDArray[Any]") -> "NDArray[Any]":
    """Return one fp16 number for each block as bytes, (blocks, 2)."""
    return values.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _mxfp4(layer: nn.Module, rows: "NDArray[np.intp] | None") -> "NDArray[Any]":
    """Return blocks of a shared exponent, as MLX's, and 32 codes whose order within the bytes differs from MLX's."""
    exponents, packed = numpy_of(layer.scales), numpy_of(layer.weight).view(np.uint8)
    if rows is not None:
        exponents, packed = exponents[rows], packed[rows]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, _BLOCK)
    both = codes[:, : _BLOCK // 2] | (codes[:, _BLOCK // 2 :] << 4)
    return np.concatenate([exponents.reshape(-1, 1), both], axis=-1).reshape(*packed.shape[:-1], -1)


def _q6_k(weight: "NDArray[Any]") -> "NDArray[Any]":
    """Return super-blocks of 256 six-bit codes with 16 eight-bit scales and one fp16 scale of those.

    Each scale is the best of 19 candidates by squared error weighted with the squared weights, as `make_qx_quants` of
    ggml-quants.c does.
    """
    groups = np.ascontiguousarray(weight, np.float32).reshape(-1, 16)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), axis=-1)
    best, scale = np.full_like(largest, -1.0), np.zeros_like(largest)
    squares = groups * groups
    with np.errstate(divide="ignore", invalid="ignore"):
        for step in range(-9, 10):
            inverse = np.where(largest == 0, 0, -(32 + 0.1 * step) / largest)
            codes = np.clip(np.rint(groups * inverse), -32, 31)
            norm = (squares * codes * codes).sum(-1, keepdims=True)
            product = (squares * groups * codes).sum(-1, keepdims=True)
            gain = np.where(norm > 0, product * product / norm, 0)
            better = gain > best
            best, scale = np.where(better, gain, best), np.where(better & (norm > 0), product / norm, scale)
        scales = scale.reshape(-1, 16)
        peak = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), axis=-1)
        outer = (peak / -128).astype(np.float16)
        inner = np.where(outer == 0, 0, np.clip(np.rint(scales / outer.astype(np.float32)), -128, 127))
        step_size = (outer.astype(np.float32) * inner).reshape(-1, 1)
        codes = np.where(step_size == 0, 0, np.clip(np.rint(groups / step_size), -32, 31)) + 32
    blocks = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # of 128 codes, four runs of 32 share their bytes
    low = (blocks[:, :, :2] & 15) | ((blocks[:, :, 2:] & 15) << 4)
    high = sum((blocks[:, :, run] >> 4) << (2 * run) for run in range(4))
    count = len(blocks)
    parts = (
        low.reshape(count, -1),
        np.asarray(high, np.uint8).reshape(count, -1),
        inner.astype(np.int8).view(np.uint8),
        outer.view(np.uint8),
    )
    return np.concatenate(parts, axis=-1).reshape(*weight.shape[:-1], -1)
