"""Pack a matrix into MLX's quantized format and unpack it, including symmetric codes in affine storage."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from mlxflow.ops.row_slices import dequantized
from mlxflow.quantization.settings import Setting

#: The smallest multiple of the unclipped scale that is tried, by bits: below it, clipping costs more than it saves.
_LEAST_MULTIPLE = {2: 0.4, 3: 0.5, 4: 0.65, 5: 0.75, 6: 0.85, 8: 0.93}
_MOST_MULTIPLE = 1.03
_MULTIPLES = 28


class Packed(NamedTuple):
    """A matrix in MLX's quantized format.

    Attributes:
        weight: codes, little-endian bit streams of each row in uint32 words, (..., N * bits / 32).
        scales: (..., N / group_size).
        biases: of the same shape; None in modes without biases.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None

    @property
    def nbytes(self) -> int:
        """Size of all three arrays in bytes."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.biases is None else self.biases.nbytes)


def pack(weight: mx.array, setting: Setting, grid: mx.array | None = None) -> Packed:
    """Return the codes, scales and biases of a matrix, as MLX stores them.

    Args:
        weight: (..., N) in fp32, fp16 or bf16; the group size divides N.
        setting: of the quantization.
        grid: scales and biases for the modes "affine" and "symmetric", (2, ..., N / group_size); None for MLX's, or
            that of `symmetric_grid`.

    Raises:
        ValueError: MLX does not have the setting.
    """
    if grid is None and setting.mode == "symmetric":
        grid = symmetric_grid(weight, setting)
    if grid is None and scales_dtype(setting, weight.dtype) != weight.dtype:
        grid = mlx_grid(weight, setting)
    if grid is not None:
        return Packed(_pack_on(setting.bits)(weight, grid), grid[0], grid[1])
    parts = mx.quantize(weight, group_size=setting.group_size, bits=setting.bits, mode=setting.mode)
    return Packed(*parts) if len(parts) > 2 else Packed(parts[0], parts[1], None)


def unpack(packed: Packed, setting: Setting, dtype: mx.Dtype | None = None) -> mx.array:
    """Return the dequantized matrix, in the dtype of the scales if none is given; modes with integer scales need one.

    Wider than the scales, it is what MLX computes with for activations of that dtype.
    """
    scales, biases = packed.scales, packed.biases
    if biases is not None and dtype is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return dequantized(
        packed.weight,
        scales,
        biases,
        group_size=setting.group_size,
        bits=setting.bits,
        mode=setting.stored_mode,
        dtype=dtype,
    )


def scales_dtype(setting: Setting, weight_dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype of the affine scales and biases of weights with a dtype."""
    return mx.bfloat16 if setting.has_narrow_scales and weight_dtype == mx.float32 else weight_dtype


def mlx_grid(weight: mx.array, setting: Setting) -> mx.array:
    """Return MLX's affine scales and biases of a matrix, (2, ..., N / group_size), in the dtype of `scales_dtype`."""
    _, *grid = mx.quantize(weight, group_size=setting.group_size, bits=setting.bits)
    return mx.stack(grid).astype(scales_dtype(setting, weight.dtype))


def narrowed(packed: Packed, setting: Setting) -> Packed:
    """Return a packed matrix with its affine scales and biases in the dtype that a setting has for fp32 weights."""
    if packed.biases is None:
        return packed
    dtype = scales_dtype(setting, packed.scales.dtype)
    return Packed(packed.weight, packed.scales.astype(dtype), packed.biases.astype(dtype))


def round_trip(weight: mx.array, setting: Setting) -> mx.array:
    """Return a matrix packed and unpacked again, in its own dtype."""
    return unpack(pack(weight, setting), setting, weight.dtype)


def places_on(groups: mx.array, grid: mx.array) -> mx.array:
    """Return the positions of weights on a grid in units of its step, 0 for the first point, in fp32; 0 if scale is 0.

    Args:
        groups: weights, (..., G).
        grid: their scales and biases, (2, ...).
    """
    scales, biases = grid.astype(mx.float32)[..., None]
    return (groups.astype(mx.float32) - biases) / mx.where(scales == 0, mx.inf, scales)


def codes_on(groups: mx.array, grid: mx.array, bits: int) -> mx.array:
    """Return the codes of weights on a grid, as whole numbers in fp32; see `places_on`."""
    return mx.clip(mx.round(places_on(groups, grid)), 0, 2**bits - 1)


def is_supported(setting: Setting) -> bool:
    """Return whether the installed MLX supports a setting on the default device, by packing and unpacking with it."""
    return _can_round_trip(setting, str(mx.default_device()))


@cache
def _can_round_trip(setting: Setting, _device: str) -> bool:
    try:
        mx.eval(round_trip(mx.ones((1, 2 * setting.group_size)), setting))
    except (ValueError, RuntimeError):
        return False
    return True


def packed_bytes(shape: tuple[int, ...], setting: Setting, dtype: mx.Dtype) -> int:
    """Return the size in bytes of a packed matrix without packing it.

    Args:
        shape: of the dense matrix.
        setting: of the quantization.
        dtype: of the dense matrix, and of affine scales and biases.
    """
    count = 1
    for length in shape:
        count *= length
    groups = count // setting.group_size
    per_group = 2 * scales_dtype(setting, dtype).size if setting.stored_mode == "affine" else 1
    return count * setting.bits // 8 + groups * per_group


def symmetric_grid(weight: mx.array, setting: Setting) -> mx.array:
    """Return for each group the scale with the least squared error, and its bias, in the dtype of `scales_dtype`.

    Codes run from -2^(bits-1) to 2^(bits-1) - 1, and the scale has a sign, so that either side may have the extra code.
    Multiples of the scale that maps the largest weight to the last code are tried, each with its least-squares refit.

    Args:
        weight: (..., N).
        setting: of mode "symmetric".

    Returns:
        Scales and biases, (2, ..., N / group_size): the biases are -2^(bits-1) times the scales.
    """
    scales = _symmetric_scales(setting.bits, setting.group_size)(weight).astype(scales_dtype(setting, weight.dtype))
    return mx.stack([scales, scales * -(2 ** (setting.bits - 1))])


@cache
def _symmetric_scales(bits: int, group_size: int) -> Callable[[mx.array], mx.array]:
    half = 2 ** (bits - 1)

    def error_of(groups: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
        codes = _codes(groups, scale, half)
        return (groups - codes * scale).square().sum(-1, keepdims=True), codes

    def one(groups: mx.array, candidate: mx.array, least: mx.array, best: mx.array) -> tuple[mx.array, mx.array]:
        error, codes = error_of(groups, candidate)
        best = mx.where(error < least, candidate, best)
        least = mx.minimum(error, least)
        refit = (groups * codes).sum(-1, keepdims=True) / mx.maximum(codes.square().sum(-1, keepdims=True), 1.0)
        error, _ = error_of(groups, refit)
        return mx.minimum(error, least), mx.where(error < least, refit, best)

    compiled = mx.compile(one)

    def search(weight: mx.array) -> mx.array:
        groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, group_size)
        place = mx.argmax(mx.abs(groups), axis=-1, keepdims=True)
        largest = mx.take_along_axis(groups, place, axis=-1) / half
        best, least = mx.zeros_like(largest), groups.square().sum(-1, keepdims=True)
        step = (_MOST_MULTIPLE - _LEAST_MULTIPLE[bits]) / (_MULTIPLES - 1)
        for number in range(_MULTIPLES):
            multiple = _LEAST_MULTIPLE[bits] + number * step
            for sign in (-1, 1):
                least, best = compiled(groups, largest * (sign * multiple), least, best)
            mx.eval(least, best)  # else the graph would hold the codes of every candidate
        return best.squeeze(-1).astype(weight.dtype)

    return search


def _codes(groups: mx.array, scale: mx.array, half: int) -> mx.array:
    """Return signed codes of groups in fp32, (..., G); 0 if the scale is 0."""
    return mx.clip(mx.round(groups / mx.where(scale == 0, 1.0, scale)), -half, half - 1)


@cache
def _pack_on(bits: int) -> Callable[[mx.array, mx.array], mx.array]:
    def packed(weight: mx.array, grid: mx.array) -> mx.array:
        codes = codes_on(weight.reshape(*grid.shape[1:], -1), grid, bits)
        return bit_stream(codes.astype(mx.uint32), bits).reshape(*weight.shape[:-1], -1)

    return mx.compile(packed)


def bit_stream(codes: mx.array, bits: int) -> mx.array:
    """Pack codes as MLX does: code i of a row begins at bit i * bits of its little-endian words.

    Args:
        codes: uint32, their last axis a multiple of 32, so that each 32 of them fill whole words.
        bits: of a code.

    Returns:
        uint32, (..., codes / 32, bits).
    """
    columns = codes.reshape(*codes.shape[:-2], -1, 32)
    words: list[mx.array | None] = [None] * bits
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        column = columns[..., place]
        words[word] = _joined(words[word], column << shift)
        if shift + bits > 32:
            words[word + 1] = _joined(words[word + 1], column >> (32 - shift))
    return mx.stack([word for word in words if word is not None], axis=-1)


def _joined(word: mx.array | None, more: mx.array) -> mx.array:
    return more if word is None else word | more
