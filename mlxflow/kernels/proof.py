"""The self-proof: a kernel is compiled, compared with its reference in fp32 and timed against MLX's own way.

    python -m mlxflow.kernels.proof NAME...             prints "begin NAME" and its outcome, one line of JSON each
    python -m mlxflow.kernels.proof --compile NAME...   compiles only; prints the outcome of what does not compile
    python -m mlxflow.kernels.proof --times NAME...     tells on stderr, too, what its parts take
    python -m mlxflow.kernels.proof -                   reads the names from a line of its input, and ends with that

It runs in a process of its own, so that a kernel that hangs or brings down the device's context takes nobody with it.
That process may be started before it is known which kernels there are to prove: the device is ready then.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import mlx.core as mx

from mlxflow.kernels import language, nvrtc
from mlxflow.kernels.operations import Arrays, Operation, operation
from mlxflow.kernels.outcome import Outcome

#: A kernel must take at most this share of the time of MLX's own way, so that noise does not flip the choice.
MARGIN = 0.9

_CHECKED, _TIMED = 1 << 18, 1 << 24
_ROUNDS, _CALLS = 5, 8


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
        inputs = tried.inputs(_TIMED)
        mx.eval(inputs)
        seconds, own = _time(tried, inputs, clock, is_stopped)
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


def _time(
    tried: Operation, inputs: Arrays, clock: Callable[[], float], is_stopped: Callable[[], bool]
) -> tuple[float, float]:
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
        if is_stopped():
            raise Stopped
    return statistics.median(times[0]), statistics.median(times[1])


def compile_programs(names: Sequence[str]) -> None:
    """Let NVIDIA's compiler make the programs of kernels at the same time; nothing is computed.

    Args:
        names: of the kernels; one that does not compile says so when it is proved.
    """
    if language.language() != "cuda" or not language._programs_run():
        return
    with nvrtc.gathering() as programs:
        for name in names:
            tried = operation(name)
            with suppress(Exception):
                tried.kernel(*tried.inputs(_CHECKED))  # lazy
    language._built.cache_clear()
    nvrtc.compile_at_once(programs)


class Orders:
    """What the process that started this one tells it: a line of names, and then, maybe, a line that says to stop.

    Attributes:
        is_stopped: whether it did.
    """

    def __init__(self, descriptor: int) -> None:
        self.is_stopped = threading.Event()
        self._descriptor = descriptor
        self._rest = b""

    def names(self) -> list[str]:
        """Wait for the names, and from then on end this process when the input ends; none where it ends before."""
        line = self._line()
        if line is not None:
            threading.Thread(target=self._heed, daemon=True).start()
        return (line or "").split()

    def _line(self) -> str | None:
        while b"\n" not in self._rest:
            read = os.read(self._descriptor, 1 << 16)
            if not read:
                return None
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def _heed(self) -> None:
        while self._line() is not None:
            self.is_stopped.set()
        os._exit(1)  # nobody is there to be told


def main(arguments: list[str]) -> None:
    """Prove kernels by name, or compile them, and print what comes out as it comes."""
    flags, names = {one for one in arguments if one.startswith("--")}, [one for one in arguments if one[:2] != "--"]
    tell: Tell = _say_seconds if "--times" in flags else lambda *_: None
    with _timed("the device's beginning", tell):
        mx.eval(mx.zeros(8) + 1)  # a GPU takes a while
    is_stopped: Callable[[], bool] = lambda: False  # noqa: E731
    if names == ["-"]:
        orders = Orders(sys.stdin.fileno())
        names, is_stopped = orders.names(), orders.is_stopped.is_set
    with _timed("all programs", tell):
        compile_programs(names)
    for name in names:
        print(f"begin {name}", flush=True)
        if "--compile" in flags:
            outcome = compile_only(operation(name))
        else:
            try:
                outcome = prove(operation(name), is_stopped=is_stopped, tell=partial(_say_part, tell, name))
            except Stopped:
                return
        if outcome is not None:
            print(json.dumps({"name": name, **outcome._asdict()}), flush=True)
        mx.clear_cache()


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
