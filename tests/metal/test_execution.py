from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import execution
from tests.metal.execution import KernelFaultError
from tests.metal.stand_in import StandInKernel

pytestmark = pytest.mark.usefixtures("metal")

_AT = "const int at = thread_position_in_grid.x, worker = thread_position_in_threadgroup.x;\n"


def _run(body: str, x: mx.array, *, numbers: int = 64, threads: int = 64, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Run a kernel of one thread for each number of the result, in groups."""
    kernel: Any = mx.fast.metal_kernel(name="tried", input_names=["x"], output_names=["y"], source=_AT + body)
    result: mx.array
    (result,) = kernel(
        inputs=[x],
        grid=(numbers, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(numbers,)],
        output_dtypes=[dtype],
        template=[("THREADS", threads)],
    )
    return result


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.int64, mx.uint8, mx.bool_])
def test_results_have_the_bits_that_the_kernel_wrote(dtype: mx.Dtype) -> None:
    x = (mx.arange(70) * 3).astype(dtype)[3:67]
    found = _run("y[at] = x[63 - at];", x, dtype=dtype)
    assert found.dtype == dtype
    assert mx.array_equal(found, x[::-1])


def test_threads_exchange_numbers_in_a_simdgroup_and_over_threadgroup_memory() -> None:
    body = """
    threadgroup float sums[THREADS / 32];
    float sum = x[at];
    for (ushort step = 16; step > 0; step >>= 1) sum += metal::simd_shuffle_xor(sum, step);
    if (worker % 32 == 0) sums[worker / 32] = sum;
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    y[at] = sums[1 - worker / 32] + metal::simd_max(float(at)) + metal::simd_shuffle(float(at), 3);
    """
    x = mx.arange(128).astype(mx.float32)
    sums = np.arange(128).reshape(4, 32).sum(1)[[1, 0, 3, 2]]
    wanted = sums + np.arange(31, 128, 32) + np.arange(3, 128, 32)
    assert mx.array_equal(_run(body, x, numbers=128), mx.array(np.repeat(wanted, 32).astype(np.float32)))


def test_bfloat16_is_rounded_to_the_nearest_even_number_and_denormals_are_zero() -> None:
    x = mx.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, float("nan"), float("inf"), 1e-39, 3e38, -2.5])
    found = _run("y[at] = static_cast<bfloat16_t>(x[at] * 1.0f);", x, numbers=8, threads=8, dtype=mx.bfloat16)
    wanted = mx.where(mx.abs(x) < 1e-38, 0, x).astype(mx.bfloat16)
    assert mx.array_equal(found, wanted, equal_nan=True)


# The outputs are aligned, so a short run past the end of one stays on its page
_FAULTS = {
    "a read past the end of an input": ("y[at] = x[at + 1];", "reads at byte 256 of x, which has 256"),
    "a read before an input": ("y[at] = x[at - 5];", "reads at byte -[0-9]+ of x, which has 256"),
    "a write past the end of an output": ("y[at * 1000] = 1;", "writes at byte 4000 of y, which has 256"),
    "a write just past the end of an output": (
        "y[at + 1] = x[at];",
        "writes (outside y|at byte 256 of y, which has 256)",
    ),
    "a write before an output": ("y[at - 1] = x[at];", "writes outside y"),
    "a write to an input": ("((device float*)x)[at] = 1; y[at] = 1;", "writes to the input x"),
    "an output that is not written": (
        "if (at != 9) y[at] = x[at];",
        "y differs in reverse order of threads from element 9 on",
    ),
    "a read of four numbers where a view may begin anywhere": (
        "float4 four = *(const device float4*)(x + at / 4 * 4); y[at] = four[at % 4];",
        "reads or writes at an address that is not aligned for the type",
    ),
    "a barrier that is missing": (
        "threadgroup float s[64]; s[worker] = x[at]; y[at] = s[63 - worker];",
        "y differs in reverse order of threads from element 0 on",
    ),
    "a barrier that some threads do not reach": (
        "if (at < 40) metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\ny[at] = 1;",
        "barrier in line 8: thread 40 of group 0 has ended",
    ),
    "two barriers that do not belong together": (
        "if (at < 32) metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"
        "else metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\ny[at] = 1;",
        "barrier in line 8: thread 32 of group 0 waits in line 9",
    ),
    "a barrier for device memory only": (
        "threadgroup float s[64]; s[worker] = x[at];\n"
        "metal::threadgroup_barrier(metal::mem_flags::mem_device);\ny[at] = s[63 - worker];",
        "barrier in line 9: does not order threadgroup memory",
    ),
    "a sum over a simdgroup from which a lane is absent": (
        "y[at] = x[at]; if (worker % 32 != 5) y[at] = metal::simd_sum(x[at]);",
        "simdgroup operation in line 8: thread 5 of group 0 has ended",
    ),
    "threadgroup memory that is not written": (
        "threadgroup float s[64];\nif (worker != 3) s[worker] = x[at];\n"
        "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\ny[at] = s[63 - worker];",
        "y differs in reverse order of threads from element 60 on",
    ),
    "an index outside threadgroup memory": (
        "threadgroup float s[64]; s[worker + 1] = x[at]; y[at] = 1;",
        "an index is outside its array",
    ),
    "an index that overflows": ("y[at] = x[(at + 1) * 1000000000 % 64];", "an integer overflows"),
    "a division by zero": ("y[at] = x[64 / at % 2];", "divides by zero"),
    "more threadgroup memory than there is": (
        "threadgroup float s[9000]; s[worker] = x[at]; y[at] = s[worker];",
        "36000 bytes of threadgroup memory: more than 32 KB",
    ),
}


@pytest.mark.parametrize("case", _FAULTS)
def test_a_fault_of_a_kernel_is_an_error_that_names_it(case: str) -> None:
    body, message = _FAULTS[case]
    with pytest.raises(KernelFaultError, match=f"^({message})$"):
        _run(body, mx.arange(64).astype(mx.float32))
    assert mx.array_equal(_run("y[at] = x[at];", mx.ones(64)), mx.ones(64)), "the next kernel runs in a new process"


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_SECONDS", 1)
    body = "volatile int go = 1; while (go) {} y[at] = 1;"
    with pytest.raises(KernelFaultError, match=r"^does not end$"):
        _run(body, mx.ones(64))


def test_a_dead_runner_is_an_error_and_the_next_call_starts_another() -> None:
    x = mx.ones(64)
    _run("y[at] = x[at];", x)
    process: Any = execution.runner()._process
    process.kill()
    process.wait()
    with pytest.raises(KernelFaultError, match=r"^the runner of kernels ended without an answer$"):
        _run("y[at] = x[at];", x)
    assert mx.array_equal(_run("y[at] = x[at];", x), x)


def test_threads_run_in_the_orders_that_are_asked_for() -> None:
    last = "y[at] = 1; threadgroup float s[1]; s[0] = at;\nif (worker != 999) y[at] = s[0] - at;"
    for order in (execution.FORWARD, execution.REVERSE, execution.SHUFFLED):
        StandInKernel.orders = order
        assert mx.array_equal(_run(last, mx.ones(64)), mx.zeros(64)), "a thread runs on until it has to wait"
    StandInKernel.orders = execution.FORWARD
    raced = "threadgroup float s[64]; s[worker] = x[at]; y[at] = s[63 - worker];"
    assert bool(mx.isnan(_run(raced, mx.ones(64)))[0]), "one order alone does not show the missing barrier"
