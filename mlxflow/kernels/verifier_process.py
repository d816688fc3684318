"""Verifies kernels in subprocesses, so that a kernel that hangs or crashes its process does not stop this one.

Imports no mlx: the subprocess may be started before this process has loaded it.
"""

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

from mlxflow.device import child_processes

#: Seconds at one kernel after which MLX is taken to compile its own operations for it, which takes 4 to 25 s a kernel;
#: with all compiled, a verification takes a tenth of a second.
COLD_SECONDS = 2.0


class VerificationResult(NamedTuple):
    """The result of verifying a kernel.

    Attributes:
        passed: whether it is correct and clearly faster than MLX.
        reason: why not; empty if it passed.
        error: the largest deviation, relative to the largest value in its row; -1 where none was measured.
        seconds: of a call.
        mlx_seconds: of a call of MLX's implementation.
        holds: whether it holds for later runs: not where the device had no memory left.
    """

    passed: bool
    reason: str
    error: float = -1.0
    seconds: float = 0.0
    mlx_seconds: float = 0.0
    holds: bool = True


class VerifierOutput(NamedTuple):
    """What a verifier process has printed so far.

    Attributes:
        results: of the kernels that it finished.
        begun: the kernel that it began last; empty for none.
        failure: how the process failed; empty if it succeeded or is still running.
        is_cold: whether it still runs, and has been at one kernel for so long that MLX must be compiling.
        is_ready: whether it got as far as the kernels; if not, its failure says nothing about any of them.
    """

    results: dict[str, VerificationResult]
    begun: str
    failure: str
    is_cold: bool = False
    is_ready: bool = True

    @property
    def reason(self) -> str:
        """Why a kernel has no result."""
        return self.failure or "its verification printed no result"


class Verification(NamedTuple):
    """What came out of the verification of some kernels.

    Attributes:
        results: of the kernels that were verified.
        failure: how the verifier failed before it was ready for the others; empty if there are none.
    """

    results: dict[str, VerificationResult]
    failure: str = ""


class VerifierProcess:
    """A verifier subprocess. It may start before the kernel names are known; it is killed when the context exits.

    It reads the names from a line of its input. A second line asks it to stop: to finish what it is compiling and to
    time nothing. It ends when its input does, so also when this process dies. Before the first
    kernel it prints "ready".
    """

    def __init__(self, command: Sequence[str]) -> None:
        with ExitStack() as opened:
            self._stderr = opened.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            self._process = child_processes.start(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                bufsize=1,
                errors="replace",
            )
            self._opened = opened.pop_all()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._is_ready = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and is not waited for: a device takes a while to be released
        with suppress(BrokenPipeError):
            cast("IO[str]", self._process.stdin).close()
        self._opened.close()

    def _read(self) -> None:
        with cast("IO[str]", self._process.stdout) as output:
            for line in output:
                self._lines.put(line)
        self._lines.put(None)
        self._process.wait()

    def is_running(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    def send(self, names: Sequence[str]) -> None:
        """Send it the names of the kernels."""
        self._write(" ".join(names))

    def stop(self) -> None:
        """Ask it to finish what it is compiling, and to time nothing."""
        self._write("stop")

    def _write(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; `_failure` returns how
            cast("IO[str]", self._process.stdin).write(line + "\n")

    def listen(self, names: Sequence[str], limit_seconds: float, cold_seconds: float | None = None) -> VerifierOutput:
        """Return its output once all kernels are finished, it has ended, or it has been silent for too long.

        Args:
            names: of the kernels.
            limit_seconds: the longest silence.
            cold_seconds: the longest silence after the beginning of a kernel; then it keeps running. None for the same
                limit.
        """
        results: dict[str, VerificationResult] = {}
        begun, is_at_kernel = "", False
        while not results.keys() >= set(names):
            is_short = is_at_kernel and cold_seconds is not None
            try:
                line = self._lines.get(timeout=cold_seconds if is_short else limit_seconds)
            except queue.Empty:
                if is_short:
                    return VerifierOutput(results, begun, "", is_cold=True)
                failure = f"its process printed nothing for {limit_seconds:g} s"
                return VerifierOutput(results, begun, failure, is_ready=self._is_ready)
            if line is None:
                return VerifierOutput(results, begun, self._failure(), is_ready=self._is_ready)
            if line.strip() == "ready":
                self._is_ready = True
            elif line.startswith("begin "):
                begun, is_at_kernel = line.removeprefix("begin ").strip(), True
            elif (parsed := _parse_result(line)) is not None:
                results[parsed[0]] = parsed[1]
                is_at_kernel = False
        return VerifierOutput(results, begun, "")

    def _failure(self) -> str:
        code = self._process.wait()
        if not code:
            return ""
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or [""])[-1][:200]
        return f"its process ended with code {code}" + (last and f": {last}")


def _parse_result(line: str) -> tuple[str, VerificationResult] | None:
    try:
        fields = json.loads(line)
        return fields.pop("name"), VerificationResult(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


class Verifier(NamedTuple):
    """How kernels are verified: the commands, and the longest silence of each.

    Attributes:
        command: verifies the kernels whose names it reads, and prints what `mlxflow.kernels.verification` prints.
        compiler: compiles the kernel whose name it reads, so that its verification finds it compiled; where compiling
            takes long, all are compiled at the same time. None if compiling takes almost no time.
        limit_seconds: without output from either, after which a kernel counts as hung.
    """

    command: Sequence[str]
    compiler: Sequence[str] | None
    limit_seconds: float

    def verify(
        self,
        names: Sequence[str],
        process: VerifierProcess | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Verification:
        """Return the result of each kernel that could be verified.

        One process verifies them one after another. If MLX has to compile its own operations for them, that process
        stops, all kernels are compiled at the same time, and then another process verifies them alone on the device:
        a time measured beside a compilation is worthless.

        Args:
            names: of the kernels.
            process: of the command, started already and sent no names.
            meanwhile: called once, and waited for, while all are compiled at the same time; not called otherwise.
        """
        results: dict[str, VerificationResult] = {}
        left, is_alone = list(names), False
        cold_seconds = COLD_SECONDS if self.compiler else None
        while left:  # after a kernel that hangs or crashes, the others follow
            batch = left[:1] if is_alone else left
            output = self._verify_batch(batch, left, process, cold_seconds, meanwhile)
            results |= output.results
            process, left = None, [name for name in left if name not in results]
            missing = [name for name in batch if name in left]
            if output.is_cold:
                cold_seconds = None
            elif not output.is_ready:
                return Verification(results, output.reason)
            elif output.failure and not output.begun and len(missing) > 1:  # which one failed shows when each is alone
                is_alone = True
            elif missing:
                failed = output.begun if output.begun in missing else missing[0]
                results[failed] = VerificationResult(False, output.reason)
                left.remove(failed)
        return Verification(results)

    def _verify_batch(
        self,
        batch: Sequence[str],
        left: Sequence[str],
        process: VerifierProcess | None,
        cold_seconds: float | None,
        meanwhile: Callable[[], object],
    ) -> VerifierOutput:
        """Return the output for some kernels; if it is cold, compile all that are left."""
        if process is None or not process.is_running():
            process = VerifierProcess(self.command)
        with process:
            process.send(batch)
            output = process.listen(batch, self.limit_seconds, cold_seconds)
            results = {name: result for name, result in output.results.items() if name in batch}
            if output.is_cold:
                pending = [name for name in left if name not in results]
                results |= self._compile(pending, process, output.begun, meanwhile)
        return output._replace(results=results)

    def _compile(
        self, names: Sequence[str], process: VerifierProcess, begun: str, meanwhile: Callable[[], object]
    ) -> dict[str, VerificationResult]:
        """Compile all kernels at the same time, the process the one it has begun; return results of those that fail."""
        process.stop()
        others = [name for name in names if name != begun]
        with ThreadPoolExecutor(1 + max(1, min(len(others), os.cpu_count() or 1))) as pool:
            first = pool.submit(process.listen, [begun], self.limit_seconds)
            rest = pool.map(self._compile_one, others)
            meanwhile()
            outputs = dict(zip(others, rest, strict=True))
            outputs[begun] = first.result()
        refused = {}
        for name, output in outputs.items():
            failure = VerificationResult(False, output.failure) if output.failure and output.is_ready else None
            result = output.results.get(name, failure)
            if result is not None and not result.seconds:  # a time measured beside compilations is measured again
                refused[name] = result
        return refused

    def _compile_one(self, name: str) -> VerifierOutput:
        with VerifierProcess(self.compiler or ()) as process:
            process.send([name])
            return process.listen([name], self.limit_seconds)
