"""Weights as positions on a grid that is itself trained: rounding, scales and biases are learned together.

As in EfficientQAT's Block-AP (Chen et al. 2024, arXiv:2407.11062), all weights and the whole grid are trained, with the
straight-through estimator for rounding. Weights are kept as positions in units of their scale, so that one step size
suits all groups, and a change of the grid does not move any code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.quantization.codec import Packed, pack, scales_dtype
from mlxflow.quantization.settings import Setting

#: Trained arrays of a layer by name: positions (..., N / G, G), scales and biases (..., N / G, 1).
Trained = dict[str, mx.array]

# A scale that a group of equal weights may have; 0 would make all positions infinite
_LEAST_SCALE = 1e-8


class GridLayer(NamedTuple):
    """The fixed side of a trained layer.

    Attributes:
        setting: of its quantization, affine or symmetric.
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
        scales = mx.where(mx.abs(scales) < _LEAST_SCALE, _LEAST_SCALE, scales)
        positions = (weight.astype(mx.float32).reshape(*scales.shape[:-1], -1) - biases) / scales
        layer = cls(setting, weight.shape, *dtypes, scales, biases)
        none = mx.zeros_like(scales)
        return layer, {"positions": positions, "stretch": none, "shift": none}

    def grid(self, trained: Trained) -> tuple[mx.array, mx.array]:
        """Return the trained scales and biases, (..., N / G, 1), in fp32.

        `stretch` is the relative change of a scale, `shift` that of a bias in units of the first scale; a symmetric
        grid has no shift of its own.
        """
        scales = self.scales * (1 + trained["stretch"])
        if self.setting.mode == "symmetric":
            return scales, scales * -(2 ** (self.setting.bits - 1))
        return scales, self.biases + self.scales * trained["shift"]

    def weight(self, trained: Trained) -> mx.array:
        """Return the rounded weight in its dtype, differentiable in all trained arrays."""
        rounded = _rounding(self.setting.bits)(trained["positions"], *self.grid(trained))
        return rounded.reshape(self.shape).astype(self.dtype)

    def packed(self, trained: Trained) -> Packed:
        """Return the codes, with the grid in the dtype in which it is stored."""
        dtype = scales_dtype(self.setting, self.stored_dtype)
        scales, biases = (part.squeeze(-1).astype(dtype) for part in self.grid(trained))
        unit = mx.stack([mx.ones_like(scales), mx.zeros_like(scales)]).astype(mx.float32)
        codes = pack(trained["positions"].reshape(self.shape), self.setting, unit).weight
        return Packed(codes, scales, biases)


@functools.cache
def _rounding(bits: int) -> Callable[..., mx.array]:
    """Return a function of positions, scales and biases: the points of the grid next to the positions.

    A position gets the gradient of the point while it is on the grid, and none outside of it. Scales and biases get
    that of fixed codes.
    """
    last = 2**bits - 1

    def codes(positions: mx.array) -> mx.array:
        return mx.clip(mx.round(positions), 0, last)

    @mx.custom_function
    def points(positions: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return scales * codes(positions) + biases

    @points.vjp
    def gradients(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        positions, scales, _biases = primals
        is_on = (positions >= -0.5) & (positions <= last + 0.5)
        of_scales = (cotangent * codes(positions)).sum(axis=-1, keepdims=True)
        return mx.where(is_on, cotangent * scales, 0), of_scales, cotangent.sum(axis=-1, keepdims=True)

    return cast("Callable[..., mx.array]", points)
