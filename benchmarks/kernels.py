"""Measures each kernel against MLX's own way and against a plain addition that moves as many bytes.

    python benchmarks/kernels.py [NAME...]        the shapes of the reference job of benchmarks/train.py; needs a GPU

One line of JSON a kernel: microseconds, and how often the memory's own pace that is.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxflow import cpu
from mlxflow.kernels.operations import operation

ROWS, CALLS, ROUNDS = 16 * 1024, 10, 7

#: Name, numbers in an input, bytes that cannot be avoided per number: read and written.
CASES = (
    ("rms_norm/bfloat16/576", ROWS * 576, 2 * 5),
    ("rms_norm/bfloat16/2048", ROWS * 2048, 2 * 5),
    ("rms_norm/float32/576", ROWS * 576, 4 * 5),
    ("gated_silu/bfloat16", ROWS * 1536, 2 * 5),
    ("gated_gelu_approx/bfloat16", ROWS * 1536, 2 * 5),
    ("gated_gelu/bfloat16", ROWS * 1536, 2 * 5),
    ("cross_entropy/bfloat16", ROWS * 8192, 2 * 2),
    ("adamw/bfloat16/bfloat16", 134_000_000, 2 * 7),
    ("adamw/float32/bfloat16", 134_000_000, 4 * 6 + 2 * 2),
    ("sum_of_squares/bfloat16", 134_000_000, 2),
)


def _microseconds(function: Callable[..., Any], inputs: Sequence[mx.array]) -> float:
    times = []
    for number in range(ROUNDS + 1):
        mx.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            mx.async_eval(function(*inputs))
        mx.synchronize()
        if number:
            times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def _copy_microseconds(size: int) -> float:
    """Return the time of an addition that reads and writes so many bytes."""
    count = size // 6
    one = mx.random.normal((count,), key=mx.random.key(0)).astype(mx.bfloat16)
    other = mx.random.normal((count,), key=mx.random.key(1)).astype(mx.bfloat16)
    mx.eval(one, other)
    return _microseconds(lambda a, b: a + b, [one, other])


def _main() -> None:
    for name, numbers, bytes_each in CASES:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        tried = operation(name)
        inputs = tried.inputs(numbers)
        mx.eval(inputs)
        kernel, own = _microseconds(mx.compile(tried.kernel), inputs), _microseconds(tried.own, inputs)
        pace = _copy_microseconds(numbers * bytes_each)
        row = {"kernel": name, "us": kernel, "mlx_us": own, "pace_us": pace}
        shown = {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(shown | {"of_pace": round(kernel / pace, 2), "mlx_of_pace": round(own / pace, 2)}), flush=True)
        del inputs
        mx.clear_cache()


if __name__ == "__main__":
    cpu.prepare()
    _main()
