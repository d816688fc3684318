"""Verifies kernels: each is compiled, compared with its reference in fp32 and timed against MLX's implementation.

    python -m mlxflow.kernels.verification NAME...
        prints "begin NAME" and the kernel's result, a line of JSON
    python -m mlxflow.kernels.verification --compile NAME...
        compiles only; prints the results of kernels that do not compile
    python -m mlxflow.kernels.verification --times NAME...
        prints also the seconds of each part, on stderr
    python -m mlxflow.kernels.verification -
        reads the names from a line of its input, and ends when the input does

It runs in its own process, so that a kernel that hangs or breaks the device's context does not stop a training run.
That process may be started before the kernel names are known: MLX is loaded and the device ready by then.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import mlx.core as mx

from mlxflow.device import child_processes, memory_errors
from mlxflow.kernels import codegen, nvrtc, repeatability
from mlxflow.kernels.verification_cases import Case, case_of
from mlxflow.kernels.verification_inputs import Arrays
from mlxflow.kernels.verifier_process import VerificationResult
from mlxflow.messages.errors import reason_of

#: A kernel must take at most this share of the time of MLX's implementation, so that noise does not flip the result.
MARGIN = 0.9

_CHECKED, _TIMED = 1 << 18, 1 << 24
_ROUNDS, _CALLS = 5, 32
#: Seconds for the calls of a round; a function that takes longer is called once.
_ROUND_SECONDS = 2e-3
#: Speed-ups over MLX from which one round is enough, and two rounds are.
_CLEAR_SPEEDUPS = (2.5, 1.4)
#: MLX's cache: to allocate memory takes longer than to fill it.
_CACHE_BYTES = 1 << 30
#: A call that takes less ends before the host has made the next one: it is timed on larger inputs.
_SHORT_SECONDS = 2e-4


ReportSeconds = Callable[[str, float], None]


class StopRequested(Exception):  # noqa: N818 not an error
    """The parent asked to stop before there was a result; all is compiled."""


def verify(
    case: Case,
    *,
    clock: Callable[[], float] = time.perf_counter,
    is_stopped: Callable[[], bool] = lambda: False,
    report_seconds: ReportSeconds = lambda *_: None,
) -> VerificationResult:
    """Return whether a kernel is correct and clearly faster than MLX.

    Args:
        case: the kernel.
        clock: returns seconds.
        is_stopped: whether other processes compile now, so that nothing can be timed.
        report_seconds: gets the name of a part and its seconds.

    Raises:
        StopRequested: the parent asked to stop before there was a result.
    """
    try:
        with _timed("check", report_seconds):
            error = _error(case)
    except Exception as failure:
        return _failure_result(failure)
    if not error <= case.tolerance:
        return VerificationResult(False, f"it deviates by {error:.2g} (at most {case.tolerance:.2g})", error)
    with _timed("timing", report_seconds):
        seconds, mlx_seconds = _time(case, clock, is_stopped)
    if seconds > MARGIN * mlx_seconds:
        reason = f"it takes {seconds * 1e6:.0f} us, MLX's implementation {mlx_seconds * 1e6:.0f} us"
        return VerificationResult(False, reason, error, seconds, mlx_seconds)
    return VerificationResult(True, "", error, seconds, mlx_seconds)


def compile_only(case: Case) -> VerificationResult | None:
    """Let MLX compile a kernel and its implementation of the same, for the process that verifies it.

    Args:
        case: the kernel.

    Returns:
        None, or the result of a kernel that does not run.
    """
    try:
        for size in (_CHECKED, _TIMED):  # MLX uses other operations for larger arrays
            inputs = case.inputs(size)
            mx.eval(_as_timed(case)(*inputs), case.mlx(*inputs))
        for inputs in case.checked_inputs(_CHECKED):
            mx.eval(case.kernel(*inputs), case.reference(*inputs))
    except Exception as failure:
        return _failure_result(failure)
    return None


def _as_timed(case: Case) -> Callable[..., Arrays]:
    """Return the kernel as a training step calls it: compiled, if MLX's implementation is."""
    return mx.compile(case.kernel) if case.is_compiled else case.kernel


def _failure_result(failure: Exception) -> VerificationResult:
    """Return the result of a kernel that raised: a reason not to use it, and none to stop."""
    reason = f"it does not run: {reason_of(failure, 300) or type(failure).__name__}"
    is_full = isinstance(failure, RuntimeError) and memory_errors.out_of_memory_bytes(failure) is not None
    return VerificationResult(False, reason, holds=not is_full)  # other processes may hold the memory now


def _error(case: Case) -> float:
    """Return the largest deviation of the kernel from its reference; infinite if two calls differ."""
    return max(_error_with(case, inputs) for inputs in case.checked_inputs(_CHECKED))


def _error_with(case: Case, inputs: Arrays) -> float:
    mx.eval(inputs)
    result, again, expected = case.kernel(*inputs), case.kernel(*inputs), case.reference(*inputs)
    mx.eval(result, again, expected)
    if any(not _equal(first, second) for first, second in zip(result, again, strict=True)):
        return float("inf")
    return max(_deviation(*pair) for pair in zip(result, expected, strict=True))


def _equal(first: mx.array, second: mx.array) -> bool:
    return bool(mx.array_equal(first, second, equal_nan=True))


def _deviation(result: mx.array, expected: mx.array) -> float:
    """Return the largest deviation in a row over the largest value in it; infinite for another shape or NaN."""
    if result.shape != expected.shape:
        return float("inf")
    result, expected = (array.astype(mx.float32).reshape(-1, (array.shape or (1,))[-1]) for array in (result, expected))
    largest = mx.maximum(mx.abs(expected).max(-1), 1e-30)
    deviation = float((mx.abs(result - expected).max(-1) / largest).max())
    return deviation if deviation == deviation else float("inf")


def _time(case: Case, clock: Callable[[], float], is_stopped: Callable[[], bool]) -> tuple[float, float]:
    """Return the seconds of a call of the kernel and of MLX's implementation, the minimum of several rounds in turn.

    Other load on the machine makes a round longer, never shorter. One round or two are enough if the kernel is clearly
    faster.
    """

    def measure(function: Callable[..., Arrays], inputs: Arrays, calls: int = 1) -> float:
        mx.synchronize()
        begin = clock()
        for _ in range(calls):
            mx.async_eval(function(*inputs))
        mx.synchronize()
        return (clock() - begin) / calls

    functions = (_as_timed(case), case.mlx)
    inputs = case.inputs(_TIMED)
    mx.eval(inputs)
    for function in functions:
        measure(function, inputs)  # MLX compiles it
    seconds = [measure(function, inputs) for function in functions]
    if seconds[0] < _SHORT_SECONDS:
        inputs = case.inputs(4 * _TIMED)
        mx.eval(inputs)
        seconds = [measure(function, inputs) for function in functions]
    calls = [max(1, min(_CALLS, int(_ROUND_SECONDS / max(1e-9, each)))) for each in seconds]
    kernel_seconds, mlx_seconds = [], []
    for speedup in (*_CLEAR_SPEEDUPS, *[math.inf] * (_ROUNDS - len(_CLEAR_SPEEDUPS))):
        if is_stopped():
            raise StopRequested
        kernel_seconds.append(measure(functions[0], inputs, calls[0]))
        mlx_seconds.append(measure(functions[1], inputs, calls[1]))
        if speedup * max(kernel_seconds) < min(mlx_seconds):
            break
    return min(kernel_seconds), min(mlx_seconds)


def load_common_operations(have_names: Callable[[], bool]) -> None:
    """Let MLX load precompiled operations that most verifications need: products, softmax, random numbers.

    Args:
        have_names: whether the kernel names have arrived; checked between two operations.
    """
    with suppress(Exception):  # a verification that needs them reports the failure
        usual = case_of("attention/bfloat16/64")
        inputs = usual.inputs(_CHECKED)
        for function in (usual.mlx, usual.reference):
            if have_names():
                return
            mx.eval(function(*inputs))


def make_ready(
    names: Sequence[str],
    is_stopped: Callable[[], bool] = lambda: False,
    report_seconds: ReportSeconds = lambda *_: None,
) -> None:
    """Compile the programs of kernels at the same time, and let MLX load its operations meanwhile.

    "begin" is printed for each kernel before MLX's operations for it: MLX may have to compile these, which takes long.

    Args:
        names: of the kernels; one that does not compile or run is reported when it is verified.
        is_stopped: whether other processes compile now.
        report_seconds: see `verify`.

    Raises:
        StopRequested: the parent asked to stop.
    """
    if codegen.language() != "cuda" or not codegen.programs_run():
        return
    with _timed("generating all programs", report_seconds):
        inputs = {name: case_of(name).checked_inputs(_CHECKED) for name in names}
        with nvrtc.gathering() as programs:
            for name in names:
                for arrays in inputs[name]:
                    with suppress(Exception):
                        case_of(name).kernel(*arrays)  # lazy
        codegen.compile_program.cache_clear()
    with _timed("compiling them", report_seconds), nvrtc.compiling_at_once(programs):
        for name in names:
            print(f"begin {name}", flush=True)
            case = case_of(name)
            with _timed(f"{name}: MLX's operations", report_seconds), suppress(Exception):
                mx.eval(case.reference(*inputs[name][0]), case.mlx(*inputs[name][0]))
            if is_stopped():
                compile_only(case)
                raise StopRequested


class Requests:
    """The requests of the parent process, read from a file descriptor: a line of names, then maybe a line to stop.

    Args:
        descriptor: of the input, which is read from now on.
        end: called with 0 when the input ends: the parent has ended.

    Attributes:
        have_names: set when the names have arrived.
        is_stopped: set when the parent asks to stop.
    """

    def __init__(self, descriptor: int, end: Callable[[int], object] = os._exit) -> None:
        self.have_names, self.is_stopped = threading.Event(), threading.Event()
        self._names: list[str] = []
        self._descriptor, self._end = descriptor, end
        threading.Thread(target=self._read, daemon=True).start()

    def names(self) -> list[str]:
        """Wait for the names and return them."""
        self.have_names.wait()
        return self._names

    def _read(self) -> None:
        with open(self._descriptor, closefd=False) as lines:
            self._names = lines.readline().split()
            if self._names:
                self.have_names.set()
            for _ in lines:
                self.is_stopped.set()
        self._end(0)


def main(arguments: list[str]) -> None:
    """Verify kernels by name, or compile them, and print each result at once."""
    child_processes.end_with_parent()
    flags = {argument for argument in arguments if argument.startswith("--")}
    names = [argument for argument in arguments if argument not in flags]
    report_seconds: ReportSeconds = _print_seconds if "--times" in flags else lambda *_: None
    with _timed("waking the device", report_seconds):
        mx.eval(mx.zeros(8) + 1)  # a GPU takes a while
    mx.set_cache_limit(_CACHE_BYTES)
    is_stopped: Callable[[], bool] = lambda: False  # noqa: E731
    if names == ["-"]:
        requests = Requests(sys.stdin.fileno())
        threading.Thread(target=codegen.trial_program, daemon=True).start()
        with _timed("loading common operations", report_seconds):
            load_common_operations(requests.have_names.is_set)
        names, is_stopped = requests.names(), requests.is_stopped.is_set
        print("ready", flush=True)  # from here on a failure may be a kernel's
    with suppress(StopRequested):
        make_ready(names, is_stopped, report_seconds)
        for name in names:
            print(f"begin {name}", flush=True)
            result: VerificationResult | None
            if repeatability.is_check(name):
                result = repeatability.check(name)
            elif "--compile" in flags:
                result = compile_only(case_of(name))
            else:
                result = verify(
                    case_of(name), is_stopped=is_stopped, report_seconds=partial(_report_part, report_seconds, name)
                )
            if result is not None:
                print(json.dumps({"name": name, **result._asdict()}), flush=True)


@contextmanager
def _timed(part: str, report_seconds: ReportSeconds) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    report_seconds(part, time.perf_counter() - begin)


def _print_seconds(part: str, seconds: float) -> None:
    print(f"{seconds:7.3f} s  {part}", file=sys.stderr, flush=True)


def _report_part(report_seconds: ReportSeconds, name: str, part: str, seconds: float) -> None:
    report_seconds(f"{name}: {part}", seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
