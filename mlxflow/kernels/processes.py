"""Proves kernels in processes of their own, so that one that hangs or brings down its process takes nobody with it."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mlxflow.kernels.outcome import Outcome


class Told(NamedTuple):
    """What a process came to.

    Attributes:
        outcomes: of the kernels that it told of.
        begun: the kernel that it began last; empty for none.
        end: how it ended, in words; empty where it ended well.
    """

    outcomes: dict[str, Outcome]
    begun: str
    end: str


def prove(
    names: Sequence[str], *, command: Sequence[str], compiler: Sequence[str] | None, limit_seconds: float
) -> dict[str, Outcome]:
    """Return the outcome of each kernel.

    All are compiled at the same time, and then proved one after another by one process with the device to itself:
    what is measured beside a compilation is no measurement.

    Args:
        names: of the kernels.
        command: see `choice.prove_all`.
        compiler: see `choice.prove_all`.
        limit_seconds: see `choice.prove_all`.
    """
    outcomes = {} if compiler is None else _compile(names, compiler, limit_seconds)
    left = [name for name in names if name not in outcomes]
    while left:  # after one that hangs or crashes it goes on with the others
        told = run([*command, *left], limit_seconds)
        outcomes |= {name: outcome for name, outcome in told.outcomes.items() if name in left}
        left = [name for name in left if name not in outcomes]
        if left:
            failed = told.begun if told.begun in left else left[0]
            outcomes[failed] = Outcome(False, told.end or "its proof told nothing")
            left.remove(failed)
    return outcomes


def _compile(names: Sequence[str], compiler: Sequence[str], limit_seconds: float) -> dict[str, Outcome]:
    """Return the outcomes of the kernels that do not compile."""
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda name: run([*compiler, name], limit_seconds), names))
    return {
        name: told.outcomes.get(name, Outcome(False, told.end))
        for name, told in zip(names, found, strict=True)
        if name in told.outcomes or told.end
    }


def run(command: Sequence[str], limit_seconds: float) -> Told:
    """Run a process that tells of kernels; end it when it says nothing for too long.

    Args:
        command: the process.
        limit_seconds: between two lines.
    """
    lines: list[str] = []
    is_late = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):

        def watch() -> threading.Timer:
            def end() -> None:
                is_late.set()
                process.kill()

            timer = threading.Timer(limit_seconds, end)
            timer.start()
            return timer

        timer = watch()
        for line in process.stdout or ():
            timer.cancel()
            lines.append(line)
            timer = watch()
        process.wait()
        timer.cancel()
        said.seek(0)
        last = (said.read().strip().splitlines() or [""])[-1][:200]
    outcomes, begun = _parse(lines)
    if is_late.is_set():
        return Told(outcomes, begun, f"its process told nothing for {limit_seconds:g} s")
    if process.returncode:
        return Told(outcomes, begun, f"its process ended with code {process.returncode}" + (last and f": {last}"))
    return Told(outcomes, begun, "")


def _parse(lines: Sequence[str]) -> tuple[dict[str, Outcome], str]:
    found, begun = {}, ""
    for line in lines:
        if line.startswith("begin "):
            begun = line.removeprefix("begin ").strip()
            continue
        try:
            told = json.loads(line)
            name = told.pop("name")
            found[name] = Outcome(**told)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found, begun
