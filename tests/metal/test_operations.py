import mlx.core as mx
import pytest

from mlxflow.kernels.codegen import THREADS
from mlxflow.kernels.kernel_names import TYPES
from tests.metal import execution, operations
from tests.metal.mutants import MUTANTS
from tests.metal.stand_in import StandInKernel

#: By default those run with which a mutant is refused: a refusal says nothing if the kernel itself is refused too.
_USUAL = {(mutant.dtype, mutant.operation) for mutant in MUTANTS.values()}
_ALL = [
    pytest.param(dtype, name, marks=[] if (dtype, name) in _USUAL else pytest.mark.metal)
    for dtype in TYPES
    for name in operations.every(TYPES[dtype])
]


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("dtype", "name"), _ALL)
def test_a_kernel_computes_what_float64_does(dtype: str, name: str) -> None:
    assert operations.every(TYPES[dtype])[name].error() <= 1


@pytest.mark.parametrize("dtype", TYPES)
def test_metal_would_compile_every_kernel_at_every_size(metal: type[StandInKernel], dtype: str) -> None:
    metal.executes = False
    for operation in operations.every(TYPES[dtype]).values():
        operation.kernel(*operation.inputs)
    kernels = {source.instance.split("_mlxflow_")[1].partition("_" + dtype)[0] for source in metal.sources}
    assert {"rms_norm", "rms_norm_backward", "sum_rms_norm", "sum_rms_norm_backward"} <= kernels
    assert {"rms_norm_frozen_backward", "sum_rms_norm_frozen_backward"} <= kernels
    assert len(metal.sources) > 40
    constants = [
        parameter for source in metal.sources for parameter in source.parameters if "constant" in parameter.type
    ]
    assert {"t", "n", "begins", "x", "s", "rate"} <= {parameter.name for parameter in constants}


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("dtype", TYPES)
def test_views_and_transposed_arrays_are_taken(dtype: str) -> None:
    whole = operations.random((3 * 41 * 72 + 5,), 0, TYPES[dtype])
    begin = whole[5:].reshape(3 * 41, 72)
    usual = operations.norm(TYPES[dtype], 1, 72)
    weight = operations.random((72,), 1, TYPES[dtype])
    for x in (begin, begin[1::2], operations.random((72, 41), 2, TYPES[dtype]).T, begin[:, ::-1]):
        operation = usual._replace(inputs=[x, weight, mx.broadcast_to(weight, x.shape)], additions=300)
        assert operation.error() <= 1


@pytest.mark.metal
@pytest.mark.parametrize("dtype", TYPES)
def test_two_groups_of_a_norm_fit_the_memory_of_a_core(metal: type[StandInKernel], dtype: str) -> None:
    metal.executes = False
    for name, operation in operations.every(TYPES[dtype]).items():
        if "norm" in name:
            operation.kernel(*operation.inputs)
    sizes = {source.instance: execution.threadgroup_bytes(source, THREADS) for source in metal.sources}
    assert len(sizes) >= 10
    assert max(sizes.values()) > 8000, "the backward norm shares a part of the columns"
    assert max(sizes.values()) <= 12 * 1024
