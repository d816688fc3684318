"""Weights as positions on a grid that is itself trained: rounding, scales and biases are learned together.

As in EfficientQAT's Block-AP (Chen et al. 2024, arXiv:2407.11062), all weights and the whole grid are trained, with the
straight-through estimator for rounding. Weights are kept as positions in units of their scale, so that one step size
suits all groups, and a change of the grid does not move any code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.ops.custom_function import custom_function
from mlxflow.quantization import float_grid
from mlxflow.quantization.codec import Packed, pack, scales_dtype
from mlxflow.quantization.grids import codes_of, grid_of, is_float
from mlxflow.quantization.settings import Setting

#: Trained arrays of a layer by name: "positions", (..., N / G, G), and in some modes "stretch" and "shift", of shape
#: (..., N / G, 1).
Trained = dict[str, mx.array]

# A scale that a group of equal weights may have; 0 would make all positions infinite
_LEAST_SCALE = 1e-8

# Change of an E4M3 scale for a change of "stretch": neighbours are up to 12 % apart
_FLOAT_STRETCH = 4.0

# Half of the distance of the two largest elements
_HALF_LAST_STEP = {"mxfp4": 1.0, "nvfp4": 1.0, "mxfp8": 16.0}


class GridLayer(NamedTuple):
    """The fixed side of a trained layer.

    Attributes:
        setting: of its quantization.
        shape: of the weight.
        dtype: of the weight in a forward pass.
        stored_dtype: of the weight in the model; see `codec.scales_dtype`.
        scales: first scales, (..., N / G, 1), in fp32.
        biases: first biases, (..., N / G, 1), in fp32.
    """

    setting: Setting
    shape: tuple[int, ...]
    dtype: mx.Dtype
    stored_dtype: mx.Dtype
    scales: mx.array
    biases: mx.array

    @classmethod
    def begin(
        cls, weight: mx.array, setting: Setting, grid: mx.array, *, dtypes: tuple[mx.Dtype, mx.Dtype]
    ) -> "tuple[GridLayer, Trained]":
        """Return a layer and its arrays to train, on a first grid.

        Args:
            weight: (..., N).
            setting: of the quantization.
            grid: scales and biases, (2, ..., N / G).
            dtypes: of the weight in a forward pass, and in the model.
        """
        scales, biases = grid.astype(mx.float32)[..., None]
        if not is_float(setting):
            scales = mx.where(mx.abs(scales) < _LEAST_SCALE, _LEAST_SCALE, scales)
        positions = (weight.astype(mx.float32).reshape(*scales.shape[:-1], -1) - biases) / scales
        layer = cls(setting, weight.shape, *dtypes, scales, biases)
        return layer, {"positions": positions, **layer.unchanged()}

    @classmethod
    def of_packed(
        cls, packed: Packed, setting: Setting, *, dtypes: tuple[mx.Dtype, mx.Dtype]
    ) -> "tuple[GridLayer, Trained]":
        """Return a layer and its arrays to train that begin with the codes and the grid of a packed matrix.

        Args:
            packed: the matrix.
            setting: of the quantization.
            dtypes: of the weight in a forward pass, and in the model.
        """
        codes, (scales, biases) = codes_of(packed, setting), grid_of(packed, setting)[..., None]
        mx.eval(codes, scales, biases)
        layer = cls(setting, codes.shape, *dtypes, scales, biases)
        return layer, {"positions": codes.reshape(*scales.shape[:-1], -1), **layer.unchanged()}

    def positions_of(self, weight: mx.array, codes: mx.array) -> mx.array:
        """Return positions with some codes, (..., N / G, G): those of a weight where they have these codes.

        Args:
            weight: dense, (..., N).
            codes: (..., N / G, G).
        """
        positions = (weight.astype(mx.float32).reshape(codes.shape) - self.biases) / self.scales
        return mx.where(_codes(positions, self.setting) == codes, positions, codes)

    def unchanged(self) -> Trained:
        """Return the arrays of the grid before training: scales that are powers of two are not trained."""
        names = {"affine": ("stretch", "shift"), "symmetric": ("stretch",), "nvfp4": ("stretch",)}
        return {name: mx.zeros_like(self.scales) for name in names.get(self.setting.mode, ())}

    @property
    def spacing(self) -> float:
        """The distance of two points in units of the scale, as far as one step size suits all modes."""
        return _HALF_LAST_STEP.get(self.setting.mode, 1.0)

    def grid(self, trained: Trained) -> tuple[mx.array, mx.array]:
        """Return the trained scales and biases as they are stored, (..., N / G, 1), in fp32.

        `stretch` is the relative change of a scale, `shift` that of a bias in units of the first scale; a symmetric
        grid has no shift of its own, and one of floating-point elements no bias.
        """
        if is_float(self.setting):
            if "stretch" not in trained:
                return self.scales, self.biases
            return _storable(self.setting)(self.scales * (1 + _FLOAT_STRETCH * trained["stretch"])), self.biases
        storable = _narrowed(scales_dtype(self.setting, self.stored_dtype))
        scales = storable(self.scales * (1 + trained["stretch"]))
        if self.setting.mode == "symmetric":
            return scales, scales * -(2 ** (self.setting.bits - 1))
        return scales, storable(self.biases + self.scales * trained["shift"])

    def weight(self, trained: Trained) -> mx.array:
        """Return the rounded weight in its dtype, differentiable in all trained arrays."""
        rounded = _rounding(self.setting)(trained["positions"], *self.grid(trained))
        return rounded.reshape(self.shape).astype(self.dtype)

    def packed(self, trained: Trained) -> Packed:
        """Return the codes, with the grid in the dtype in which it is stored."""
        if is_float(self.setting):
            scales = self.grid(trained)[0].squeeze(-1)
            return float_grid.pack_elements(trained["positions"].reshape(self.shape), scales, self.setting)
        dtype = scales_dtype(self.setting, self.stored_dtype)
        scales, biases = (part.squeeze(-1).astype(dtype) for part in self.grid(trained))
        unit = mx.stack([mx.ones_like(scales), mx.zeros_like(scales)]).astype(mx.float32)
        codes = pack(trained["positions"].reshape(self.shape), self.setting, unit).weight
        return Packed(codes, scales, biases)


@functools.cache
def _storable(setting: Setting) -> Callable[[mx.array], mx.array]:
    """Return a function that rounds scales to those that can be stored, with the gradient of the identity."""
    return _straight(lambda scales: float_grid.stored_scales(scales, setting))


@functools.cache
def _narrowed(dtype: mx.Dtype) -> Callable[[mx.array], mx.array]:
    """Return a function that rounds fp32 numbers to a dtype, with the gradient of the identity."""
    return _straight(lambda numbers: numbers.astype(dtype).astype(mx.float32))


def _straight(rounded: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    function = custom_function(rounded)

    @function.vjp
    def gradients(_primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        return cotangent

    return cast("Callable[[mx.array], mx.array]", function)


def _codes(positions: mx.array, setting: Setting) -> mx.array:
    if is_float(setting):
        return float_grid.round_elements(positions, setting.mode)
    return mx.clip(mx.round(positions), 0, 2**setting.bits - 1)


@functools.cache
def _rounding(setting: Setting) -> Callable[..., mx.array]:
    """Return a function of positions, scales and biases: the points of the grid next to the positions.

    A position gets the gradient of the point while it is on the grid, and none outside of it. Scales and biases get
    that of fixed codes.
    """
    if is_float(setting):
        last = float_grid.LARGEST[setting.mode]
        low, high = -last - _HALF_LAST_STEP[setting.mode], last + _HALF_LAST_STEP[setting.mode]
    else:
        low, high = -0.5, 2**setting.bits - 0.5

    @custom_function
    def points(positions: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return scales * _codes(positions, setting) + biases

    @points.vjp
    def gradients(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        positions, scales, _biases = primals
        is_on = (positions >= low) & (positions <= high)
        of_scales = (cotangent * _codes(positions, setting)).sum(axis=-1, keepdims=True)
        return mx.where(is_on, cotangent * scales, 0), of_scales, cotangent.sum(axis=-1, keepdims=True)

    return cast("Callable[..., mx.array]", points)
