"""The self-proof: a kernel is compiled, compared with its reference in fp32 and timed against MLX's own way.

    python -m mlxflow.kernels.proof NAME...             prints "begin NAME" and its outcome, one line of JSON each
    python -m mlxflow.kernels.proof --compile NAME...   compiles only; prints the outcome of what does not compile

It runs in a process of its own, so that a kernel that hangs or brings down the device's context takes nobody with it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

from mlxflow.kernels.operations import Arrays, Operation, operation
from mlxflow.kernels.outcome import Outcome

#: A kernel must take at most this share of the time of MLX's own way, so that noise does not flip the choice.
MARGIN = 0.9

_CHECKED, _TIMED = 1 << 18, 1 << 24
_ROUNDS, _CALLS = 5, 8


def prove(tried: Operation, *, clock: Callable[[], float] = time.perf_counter) -> Outcome:
    """Return whether a kernel may serve.

    Args:
        tried: the operation.
        clock: tells seconds.
    """
    try:
        error = _error(tried)
    except Exception as failure:
        return _failed(failure)
    if not error <= tried.tolerance:
        return Outcome(False, f"it is wrong by {error:.2g} (at most {tried.tolerance:.2g})", error)
    inputs = tried.inputs(_TIMED)
    mx.eval(inputs)
    seconds, own = _time(tried, inputs, clock)
    if seconds > MARGIN * own:
        reason = f"it takes {seconds * 1e6:.0f} us, MLX's own way {own * 1e6:.0f} us"
        return Outcome(False, reason, error, seconds, own)
    return Outcome(True, "", error, seconds, own)


def compile_only(tried: Operation) -> Outcome | None:
    """Let MLX compile a kernel and what it is measured against, and keep both for the process that proves it.

    Args:
        tried: the operation.

    Returns:
        None, or the outcome of a kernel that does not run.
    """
    inputs = tried.inputs(_CHECKED)
    try:
        mx.eval(mx.compile(tried.kernel)(*inputs), tried.reference(*inputs), tried.own(*inputs))
    except Exception as failure:
        return _failed(failure)
    return None


def _failed(failure: Exception) -> Outcome:
    """Return the outcome of a kernel that raised: a reason not to use it, and none to stop, whoever says it."""
    return Outcome(False, f"it does not run: {' '.join(str(failure).split())[:300] or type(failure).__name__}")


def _error(tried: Operation) -> float:
    inputs = tried.inputs(_CHECKED)
    mx.eval(inputs)
    found, again, wanted = tried.kernel(*inputs), tried.kernel(*inputs), tried.reference(*inputs)
    mx.eval(found, again, wanted)
    if any(not _equal(one, other) for one, other in zip(found, again, strict=True)):
        return float("inf")
    return max(_deviation(one, other) for one, other in zip(found, wanted, strict=True))


def _equal(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other, equal_nan=True))


def _deviation(found: mx.array, wanted: mx.array) -> float:
    """Return the largest deviation in a row over the largest number in it; infinite for another shape or no number."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = (array.astype(mx.float32).reshape(-1, (array.shape or (1,))[-1]) for array in (found, wanted))
    largest = mx.maximum(mx.abs(wanted).max(-1), 1e-30)
    deviation = float((mx.abs(found - wanted).max(-1) / largest).max())
    return deviation if deviation == deviation else float("inf")


def _time(tried: Operation, inputs: Arrays, clock: Callable[[], float]) -> tuple[float, float]:
    """Return seconds of a call of the kernel and of MLX's own way, in turn."""
    compiled = mx.compile(tried.kernel)  # as in a step: its constants are made once
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(_ROUNDS + 1):
        for function, kept in zip((compiled, tried.own), times, strict=True):
            mx.synchronize()
            begin = clock()
            for _ in range(_CALLS):
                mx.async_eval(function(*inputs))
            mx.synchronize()
            seconds = (clock() - begin) / _CALLS
            if number:  # the first round compiles
                kept.append(seconds)
    return statistics.median(times[0]), statistics.median(times[1])


def main(arguments: list[str]) -> None:
    """Prove kernels by name, or compile them, and print what comes out as it comes."""
    compiles = arguments[:1] == ["--compile"]
    for name in arguments[compiles:]:
        print(f"begin {name}", flush=True)
        outcome = compile_only(operation(name)) if compiles else prove(operation(name))
        if outcome is not None:
            print(json.dumps({"name": name, **outcome._asdict()}), flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
