"""Proves kernels in processes of their own, so that one that hangs or brings down its process takes nobody with it."""

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import IO, NamedTuple, Self, cast

from mlxflow.kernels.verification_outcome import Outcome
from mlxflow.system import child_processes

#: Seconds after which a kernel that was begun is taken for one that waits for MLX to compile its own operations, which
#: takes 4 to 25 s a kernel; where they are compiled already, a proof takes a tenth of a second.
COLD_SECONDS = 2.0


class Told(NamedTuple):
    """What a process came to.

    Attributes:
        outcomes: of the kernels that it told of.
        begun: the kernel that it began last; empty for none.
        end: how it ended, in words; empty where it ended well, or has not ended.
        is_cold: whether it has not ended, and is at a kernel for too long to have found everything compiled.
    """

    outcomes: dict[str, Outcome]
    begun: str
    end: str
    is_cold: bool = False


class Prover:
    """A process that tells of kernels, started before it is told of which. It ends with this one, and with the block.

    It reads their names from a line of its input, and then, maybe, a line that tells it to stop: to finish what it is
    compiling, and to time nothing. It ends when its input does.
    """

    def __init__(self, command: Sequence[str]) -> None:
        with ExitStack() as opened:
            self._said = opened.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            self._process = child_processes.start(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                bufsize=1,
                errors="replace",
            )
            self._opened = opened.pop_all()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and is not waited for: a device takes a while to be given back
        with suppress(BrokenPipeError):
            cast("IO[str]", self._process.stdin).close()
        self._opened.close()

    def _read(self) -> None:
        with cast("IO[str]", self._process.stdout) as told:
            for line in told:
                self._lines.put(line)
        self._lines.put(None)
        self._process.wait()

    def is_there(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    def tell(self, names: Sequence[str]) -> None:
        """Tell it the names of the kernels."""
        self._write(" ".join(names))

    def stop(self) -> None:
        """Tell it to finish what it is compiling, and to time nothing."""
        self._write("stop")

    def _write(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; how, its end says
            cast("IO[str]", self._process.stdin).write(line + "\n")

    def listen(self, names: Sequence[str], limit_seconds: float, cold_seconds: float | None = None) -> Told:
        """Return what it told until it had told of all kernels, or ended, or said nothing for too long.

        Args:
            names: of the kernels.
            limit_seconds: between two lines.
            cold_seconds: after the beginning of a kernel; then it goes on. None for as long as the limit.
        """
        outcomes: dict[str, Outcome] = {}
        begun, is_at_it = "", False
        while not outcomes.keys() >= set(names):
            is_short = is_at_it and cold_seconds is not None
            try:
                line = self._lines.get(timeout=cold_seconds if is_short else limit_seconds)
            except queue.Empty:
                if is_short:
                    return Told(outcomes, begun, "", is_cold=True)
                return Told(outcomes, begun, f"its process told nothing for {limit_seconds:g} s")
            if line is None:
                return Told(outcomes, begun, self._end())
            if line.startswith("begin "):
                begun, is_at_it = line.removeprefix("begin ").strip(), True
                continue
            found = _outcome(line)
            if found is not None:
                outcomes[found[0]] = found[1]
                is_at_it = False
        return Told(outcomes, begun, "")

    def _end(self) -> str:
        code = self._process.wait()
        if not code:
            return ""
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or [""])[-1][:200]
        return f"its process ended with code {code}" + (last and f": {last}")


def _outcome(line: str) -> tuple[str, Outcome] | None:
    try:
        told = json.loads(line)
        return told.pop("name"), Outcome(**told)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def prove(
    names: Sequence[str],
    *,
    command: Sequence[str],
    compiler: Sequence[str] | None,
    limit_seconds: float,
    ahead: Prover | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, Outcome]:
    """Return the outcome of each kernel.

    One process proves them one after another. Where it turns out to wait for MLX's compilations, it stops, all are
    compiled at the same time, and then proved by another that has the device to itself: what is measured beside a
    compilation is no measurement.

    Args:
        names: of the kernels.
        command: see `choice.prove_all`.
        compiler: see `choice.prove_all`.
        limit_seconds: see `choice.prove_all`.
        ahead: a process of the command that was started already and told no names.
        meanwhile: called once while all are compiled at the same time, and waited for; not called where none are.
    """
    outcomes: dict[str, Outcome] = {}
    left, cold_seconds, is_alone = list(names), COLD_SECONDS if compiler else None, False
    while left:  # after one that hangs or crashes it goes on with the others
        asked = left[:1] if is_alone else left
        with ahead if ahead is not None and ahead.is_there() else Prover(command) as prover:
            ahead = None
            prover.tell(asked)
            told = prover.listen(asked, limit_seconds, cold_seconds)
            outcomes |= {name: outcome for name, outcome in told.outcomes.items() if name in asked}
            if told.is_cold and compiler:
                cold_seconds = None
                at_hand = [name for name in left if name not in outcomes]
                outcomes |= _compile(at_hand, prover, told.begun, compiler, limit_seconds, meanwhile)
        left = [name for name in left if name not in outcomes]
        missing = [name for name in asked if name in left]
        if told.is_cold or not missing:
            continue
        if told.end and not told.begun and len(missing) > 1:  # whose fault it was shows when each is alone
            is_alone = True
            continue
        failed = told.begun if told.begun in missing else missing[0]
        outcomes[failed] = Outcome(False, told.end or "its proof told nothing")
        left.remove(failed)
    return outcomes


def _compile(
    names: Sequence[str],
    prover: Prover,
    begun: str,
    compiler: Sequence[str],
    limit_seconds: float,
    meanwhile: Callable[[], object],
) -> dict[str, Outcome]:
    """Let all compile at the same time, the prover what it has begun; return the outcomes of those that do not."""
    prover.stop()
    others = [name for name in names if name != begun]
    with ThreadPoolExecutor(1 + max(1, min(len(others), os.cpu_count() or 1))) as pool:
        at_it = pool.submit(prover.listen, [begun], limit_seconds)
        at_others = pool.map(lambda name: _run(compiler, name, limit_seconds), others)
        meanwhile()
        found = dict(zip(others, at_others, strict=True))
        found[begun] = at_it.result()
    refused = {}
    for name, told in found.items():
        outcome = told.outcomes.get(name, Outcome(False, told.end) if told.end else None)
        if outcome is not None and not outcome.seconds:  # what was timed beside compilations is timed again
            refused[name] = outcome
    return refused


def _run(command: Sequence[str], name: str, limit_seconds: float) -> Told:
    with Prover(command) as process:
        process.tell([name])
        return process.listen([name], limit_seconds)
