"""Puts the stand-in in the place of Metal: MLX's custom kernels are checked and executed on the CPU."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import mlx.core as mx
import numpy as np

from mlxflow.kernels import adamw, codegen, rms_norm
from tests.metal import clang, execution
from tests.metal.capture import MetalSource, capture
from tests.metal.execution import Output

_MLX_KERNEL: Callable[..., Callable[..., list[mx.array]]] = cast("Any", mx.fast.metal_kernel)

#: Cores of the GPU that is stood in for: few, so that small inputs take loops a second round.
CORES = 2

# So that the second of two runs meets other orders of threads than the first
_VARYING = random.Random(0)
_ONE_ORDER = (execution.FORWARD, execution.REVERSE, execution.SHUFFLED)


class StandInKernel:
    """What `mx.fast.metal_kernel` returns.

    Attributes:
        sources: all that were captured, in the order of the first calls.
        orders: in which the threads of later calls run; None for one order, another for each call.
        executes: whether calls are executed; if not, their sources are only checked and the results are zeros.
    """

    sources: list[MetalSource] = []  # noqa: RUF012 of all kernels
    orders: int | None = execution.ALL_ORDERS
    executes = True

    def __init__(self, name: str, input_names: Sequence[str], output_names: Sequence[str], **others: Any) -> None:
        self._kernel = _MLX_KERNEL(name=name, input_names=input_names, output_names=output_names, **others)
        self._inputs, self._outputs = input_names, output_names
        self._captured: dict[Any, MetalSource] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]],
    ) -> list[mx.array]:
        """Return the results of a call.

        Raises:
            RuntimeError: Metal's compiler would not take the source, as MLX raises it.
            execution.KernelFaultError: the kernel did what it must not do.
        """
        assert grid[1:] == threadgroup[1:] == (1, 1), "the stand-in runs one-dimensional grids"
        source = self._source(inputs, grid, threadgroup, output_shapes, output_dtypes, template)
        if not StandInKernel.executes:
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        known: dict[str, np.ndarray[Any, Any] | Output] = {}
        for name, array in zip(self._inputs, _numbers(inputs), strict=True):
            known[name] = array
            known[f"{name}_shape"], known[f"{name}_ndim"] = _shape(array.shape)
        for name, shape, dtype in zip(self._outputs, output_shapes, output_dtypes, strict=True):
            known[name] = Output(int(np.prod(shape)), dtype.size)
        results = execution.runner().run(
            execution.compiled(source, threadgroup[0]),
            grid=grid[0],
            threads=threadgroup[0],
            buffers=[(name, known[name]) for name in _buffers(source)],
            orders=StandInKernel.orders or _VARYING.choice(_ONE_ORDER),
        )
        return [
            mx.array(np.frombuffer(found, f"u{dtype.size}")).view(dtype).reshape(shape)
            for found, shape, dtype in zip(results, output_shapes, output_dtypes, strict=True)
        ]

    def _source(self, inputs: Sequence[mx.array], *call: Any) -> MetalSource:
        """Return the checked source of a call; MLX's depends on which inputs have fewer than 8 numbers."""
        grid, threadgroup, output_shapes, output_dtypes, template = call
        kinds = [(array.dtype, array.size < 8, array.ndim == 0) for array in inputs]
        key = str((kinds, threadgroup, output_dtypes, template))
        if key not in self._captured:
            arguments = {
                "grid": grid,
                "threadgroup": threadgroup,
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
                "template": template,
            }
            source = capture(self._kernel, inputs, arguments)
            try:
                clang.check(source)
            except clang.RefusedSourceError as error:
                raise RuntimeError(f"[metal::Device] Unable to build metal library from source\n{error}") from error
            self._captured[key] = source
            StandInKernel.sources.append(source)
        return self._captured[key]


@functools.cache
def _buffers(source: MetalSource) -> list[str]:
    return [parameter.name for parameter in source.parameters if parameter.attribute == "buffer"]


@functools.cache
def _shape(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.array(shape, np.int32), np.array([len(shape)], np.int32)


def _numbers(arrays: Sequence[mx.array]) -> list[np.ndarray[Any, Any]]:
    """Return the elements of arrays, those of bfloat16 as integers of the same bits: numpy has no such type."""
    known = [array.view(mx.uint16) if array.dtype == mx.bfloat16 else array for array in arrays]
    mx.eval(known)  # once for all of them
    return [np.asarray(array) for array in known]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


@contextmanager
def metal(cores: int = CORES) -> Iterator[type[StandInKernel]]:
    """Let this process believe that it runs on a Mac's GPU.

    `mx.compile` is replaced by the identity: MLX cannot trace a kernel that is executed here.
    """
    StandInKernel.orders, StandInKernel.executes = execution.ALL_ORDERS, True
    StandInKernel.sources = []
    codegen._mlx_kernel.cache_clear()
    mx.disable_compile()
    try:
        with (
            mock.patch.object(mx.fast, "metal_kernel", StandInKernel),
            mock.patch.object(mx, "is_available", _always(True)),
            mock.patch.object(mx.metal, "is_available", _always(True)),
            mock.patch.object(mx, "default_device", _always(mx.Device(mx.gpu, 0))),
            mock.patch.object(rms_norm, "gpu_cores", _always(cores)),
            mock.patch.object(adamw, "gpu_cores", _always(cores)),
        ):
            yield StandInKernel
    finally:
        mx.enable_compile()
        codegen._mlx_kernel.cache_clear()
