"""SwiGLU for training on the CPU, with the exponential of `ops.fast_exp`.

MLX's CPU backend computes the logistic function with the C library's exponential (`benchmarks/cpu.py` compares both).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx

from mlxflow.ops import mlx_lm_import, patching
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.fast_exp import LOG2_E, exp2


@contextmanager
def replaced_swiglu() -> Iterator[None]:
    """Replace mlx-lm's `swiglu` in every imported model module, for fp32 arguments, until the block ends.

    A function that is traced while the context is open keeps the replacement.
    """
    mlx_lm_import.prepare()
    from mlx_lm.models import activations

    plain = activations.swiglu

    def either(gate: mx.array, x: mx.array) -> mx.array:
        is_supported = gate.dtype == x.dtype == mx.float32
        return swiglu(gate, x) if is_supported else cast("mx.array", plain(gate, x))

    callers: list[Any] = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and vars(module).get("swiglu") is plain
    ]
    with patching.attributes(*((module, "swiglu", either) for module in callers), by=__name__):
        yield


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return gate sigmoid(gate) x (Shazeer 2020, arXiv:2002.05202), all three of one shape, in fp32."""
    return cast("tuple[mx.array, mx.array]", _swiglu(gate, x))[0]


@custom_function
def _swiglu(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the product, and the sigmoid, which only the gradient uses."""
    sigmoid = 1 / (1 + exp2(gate * -LOG2_E))
    return gate * sigmoid * x, sigmoid


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    gate, x = primals
    sigmoid, incoming = outputs[1], cotangents[0]
    return incoming * x * sigmoid * (1 + gate * (1 - sigmoid)), incoming * gate * sigmoid
