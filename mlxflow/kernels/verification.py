"""The self-proof: a kernel is compiled, compared with its reference in fp32 and timed against MLX's own way.

    python -m mlxflow.kernels.verification NAME...
        prints "begin NAME" and its outcome, one line of JSON each
    python -m mlxflow.kernels.verification --compile NAME...
        compiles only; prints the outcome of what does not compile
    python -m mlxflow.kernels.verification --times NAME...
        tells on stderr, too, what its parts take
    python -m mlxflow.kernels.verification -
        reads the names from a line of its input, and ends with that

It runs in a process of its own, so that a kernel that hangs or brings down the device's context takes nobody with it.
That process may be started before it is known which kernels there are to prove: the device is ready then.
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

from mlxflow.kernels import codegen, nvrtc
from mlxflow.kernels.verification_cases import Arrays, Operation, operation
from mlxflow.kernels.verification_outcome import Outcome
from mlxflow.system import child_processes

#: A kernel must take at most this share of the time of MLX's own way, so that noise does not flip the choice.
MARGIN = 0.9

_CHECKED, _TIMED = 1 << 18, 1 << 24
_ROUNDS, _CALLS = 5, 32
#: Of the calls of a round; one that takes longer is called once.
_ROUND_SECONDS = 2e-3
#: How often a kernel's time must go into that of MLX's own way for one round to be enough, and for two.
_NO_QUESTION = (2.5, 1.4)
#: Of memory that is kept for the next kernel's arrays: to get some takes longer than to fill it.
_CACHE_BYTES = 1 << 30
#: Of a call that is over before the host has made the next one: it is given more numbers.
_SHORT_SECONDS = 2e-4


Tell = Callable[[str, float], None]


class Stopped(Exception):  # noqa: N818 nobody's mistake
    """It was told to stop before there was an outcome; all is compiled."""


def prove(
    tried: Operation,
    *,
    clock: Callable[[], float] = time.perf_counter,
    is_stopped: Callable[[], bool] = lambda: False,
    tell: Tell = lambda *_: None,
) -> Outcome:
    """Return whether a kernel may serve.

    Args:
        tried: the operation.
        clock: tells seconds.
        is_stopped: whether others compile at this time, so that nothing can be timed.
        tell: gets the name of a part and its seconds.

    Raises:
        Stopped: it was stopped before there was an outcome.
    """
    try:
        with _timed("check", tell):
            error = _error(tried)
    except Exception as failure:
        return _failed(failure)
    if not error <= tried.tolerance:
        return Outcome(False, f"it is wrong by {error:.2g} (at most {tried.tolerance:.2g})", error)
    with _timed("timing", tell):
        seconds, own = _time(tried, clock, is_stopped)
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
    try:
        for size in (_CHECKED, _TIMED):  # some take other operations where there is more
            inputs = tried.inputs(size)
            mx.eval(_as_timed(tried)(*inputs), tried.own(*inputs))
        mx.eval(tried.reference(*tried.inputs(_CHECKED)))
    except Exception as failure:
        return _failed(failure)
    return None


def _as_timed(tried: Operation) -> Callable[..., Arrays]:
    """Return the kernel as in a step, its constants made once, or as MLX's own way is."""
    return mx.compile(tried.kernel) if tried.is_compiled else tried.kernel


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


def _time(tried: Operation, clock: Callable[[], float], is_stopped: Callable[[], bool]) -> tuple[float, float]:
    """Return seconds of a call of the kernel and of MLX's own way, the least of several rounds in turn.

    What else a machine does makes a round longer, never shorter. Where one round or two show that there is no question,
    there are no more.
    """

    def measure(function: Callable[..., Arrays], inputs: Arrays, calls: int = 1) -> float:
        mx.synchronize()
        begin = clock()
        for _ in range(calls):
            mx.async_eval(function(*inputs))
        mx.synchronize()
        return (clock() - begin) / calls

    functions = (_as_timed(tried), tried.own)
    inputs = tried.inputs(_TIMED)
    mx.eval(inputs)
    for function in functions:
        measure(function, inputs)  # compiles
    seconds = [measure(function, inputs) for function in functions]
    if seconds[0] < _SHORT_SECONDS:
        inputs = tried.inputs(4 * _TIMED)
        mx.eval(inputs)
        seconds = [measure(function, inputs) for function in functions]
    calls = [max(1, min(_CALLS, int(_ROUND_SECONDS / max(1e-9, one)))) for one in seconds]
    kernel, own = [], []
    for factor in (*_NO_QUESTION, *[math.inf] * (_ROUNDS - len(_NO_QUESTION))):
        if is_stopped():
            raise Stopped
        kernel.append(measure(functions[0], inputs, calls[0]))
        own.append(measure(functions[1], inputs, calls[1]))
        if factor * max(kernel) < min(own):
            break
    return min(kernel), min(own)


def load_usual_operations(has_come: Callable[[], bool]) -> None:
    """Let MLX load operations that most proofs need and that it never compiles: products, softmax, random numbers.

    Args:
        has_come: whether the names of kernels have; asked between two.
    """
    with suppress(Exception):  # a proof that needs them says so
        usual = operation("attention/bfloat16/64")
        inputs = usual.inputs(_CHECKED)
        for function in (usual.own, usual.reference):
            if has_come():
                return
            mx.eval(function(*inputs))


def make_ready(
    names: Sequence[str], is_stopped: Callable[[], bool] = lambda: False, tell: Tell = lambda *_: None
) -> None:
    """Let NVIDIA's compiler make the programs of kernels at the same time, and MLX load its operations meanwhile.

    Each kernel is told as begun when MLX's operations for it are: these it may have to compile, which takes long.

    Args:
        names: of the kernels; one that does not compile or compute says so when it is proved.
        is_stopped: whether others compile at this time.
        tell: see `prove`.

    Raises:
        Stopped: it was stopped.
    """
    if codegen.language() != "cuda" or not codegen._programs_run():
        return
    with _timed("finding all programs", tell):
        inputs = {name: operation(name).inputs(_CHECKED) for name in names}
        with nvrtc.gathering() as programs:
            for name in names:
                with suppress(Exception):
                    operation(name).kernel(*inputs[name])  # lazy
        codegen._built.cache_clear()
    with _timed("compiling them", tell), nvrtc.compiling_at_once(programs):
        for name in names:
            print(f"begin {name}", flush=True)
            tried = operation(name)
            with _timed(f"{name}: MLX's operations", tell), suppress(Exception):
                mx.eval(tried.reference(*inputs[name]), tried.own(*inputs[name]))
            if is_stopped():
                compile_only(tried)
                raise Stopped


class Orders:
    """What the process that started this one tells it: a line of names, and then, maybe, a line that says to stop.

    Args:
        descriptor: of the input, which is read from now on.
        end: called with 0 when the input ends: nobody is there to be told.

    Attributes:
        have_come: whether names have.
        is_stopped: whether it is to stop.
    """

    def __init__(self, descriptor: int, end: Callable[[int], object] = os._exit) -> None:
        self.have_come, self.is_stopped = threading.Event(), threading.Event()
        self._names: list[str] = []
        self._descriptor, self._end = descriptor, end
        threading.Thread(target=self._heed, daemon=True).start()

    def names(self) -> list[str]:
        """Wait for the names and return them."""
        self.have_come.wait()
        return self._names

    def _heed(self) -> None:
        with open(self._descriptor, closefd=False) as told:
            self._names = told.readline().split()
            if self._names:
                self.have_come.set()
            for _ in told:
                self.is_stopped.set()
        self._end(0)


def main(arguments: list[str]) -> None:
    """Prove kernels by name, or compile them, and print what comes out as it comes."""
    child_processes.end_with_parent()
    flags, names = {one for one in arguments if one.startswith("--")}, [one for one in arguments if one[:2] != "--"]
    tell: Tell = _say_seconds if "--times" in flags else lambda *_: None
    with _timed("the device's beginning", tell):
        mx.eval(mx.zeros(8) + 1)  # a GPU takes a while
    mx.set_cache_limit(_CACHE_BYTES)
    is_stopped: Callable[[], bool] = lambda: False  # noqa: E731
    if names == ["-"]:
        orders = Orders(sys.stdin.fileno())
        threading.Thread(target=codegen.build_trial, daemon=True).start()
        with _timed("loading while it waits", tell):
            load_usual_operations(orders.have_come.is_set)
        names, is_stopped = orders.names(), orders.is_stopped.is_set
    with suppress(Stopped):
        make_ready(names, is_stopped, tell)
        for name in names:
            print(f"begin {name}", flush=True)
            if "--compile" in flags:
                outcome = compile_only(operation(name))
            else:
                outcome = prove(operation(name), is_stopped=is_stopped, tell=partial(_say_part, tell, name))
            if outcome is not None:
                print(json.dumps({"name": name, **outcome._asdict()}), flush=True)


@contextmanager
def _timed(part: str, tell: Tell) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    tell(part, time.perf_counter() - begin)


def _say_seconds(part: str, seconds: float) -> None:
    print(f"{seconds:7.3f} s  {part}", file=sys.stderr, flush=True)


def _say_part(tell: Tell, name: str, part: str, seconds: float) -> None:
    tell(f"{name}: {part}", seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
