"""What the memory profiler costs: the same training steps with it and without it, in turns, and beside its peers.

    python benchmarks/profiler.py [--pairs 100] [--rounds 7]

Prints three things, each with a 95 % interval of the median where it was repeated:
- steps with the profiler against steps without, in many short pairs, so that what else the machine does meets both;
- what the profiler's own threads took of a core while the steps ran, from the system's count of each thread's time, on
  which no other program has a say: the sampling thread, and the readings between the steps;
- the same program run under mlxflow, memray and scalene (where they are installed), each against a plain run beside it.
"""

import argparse
import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxflow.benchmarking.statistics import Interval, median_interval, ratio_interval
from mlxflow.device import cpu_backend

PROGRAM = """
from mlxflow.device import cpu_backend
cpu_backend.prepare()
import time
import mlx.core as mx
import mlx.nn as nn
layers = [mx.random.normal((512, 512)) * 0.05 for _ in range(6)]
def loss(layers, x):
    for layer in layers:
        x = nn.gelu(x @ layer)
    return x.square().mean()
step = mx.value_and_grad(loss)
x = mx.random.normal((512, 512))
def run():
    mx.eval(step(layers, x))
"""
TIMED = """
run()
begin = time.perf_counter()
for _ in range({steps}):
    run()
print(time.perf_counter() - begin, flush=True)
"""
PROFILED = """
from pathlib import Path
from mlxflow import MemoryProfiler, profile_memory
profiler = MemoryProfiler(journal=Path({folder!r}, "journal.jsonl"))
run()
begin = time.perf_counter()
with profiler.sampling():
    for _ in range({steps}):
        with profile_memory(profiler, "step"):
            run()
        profiler.end_step()
print(time.perf_counter() - begin, flush=True)
"""
#: Steps of one half of a pair, some tenths of a second: several samples of the thread fall into it.
BLOCK_STEPS = 5
PEER_STEPS = 40


def paired(num_pairs: int, folder: str) -> None:
    """Time short blocks of steps with and without the profiler, in pairs, and count what its threads take."""
    cpu_backend.prepare()
    from mlxflow.profiling.profiler import MemoryProfiler, profile_memory

    names: dict[str, Any] = {}
    exec(PROGRAM, names)  # noqa: S102 - the program that the peers run, too
    run: Callable[[], None] = names["run"]
    profiler = MemoryProfiler(journal=Path(folder, "journal.jsonl"))
    thread_times = _watch_sampler(profiler)
    between: list[float] = []  # seconds of this thread's own time that a step's readings took

    def plain() -> None:
        for _ in range(BLOCK_STEPS):
            run()

    def profiled() -> None:
        with profiler.sampling():
            for _ in range(BLOCK_STEPS):
                begin = time.thread_time()
                phase = profile_memory(profiler, "step")
                phase.__enter__()
                inside = time.thread_time()
                run()
                after = time.thread_time()
                phase.__exit__(None, None, None)
                profiler.end_step()
                between.append(inside - begin + time.thread_time() - after)

    seconds: dict[Callable[[], None], list[float]] = {plain: [], profiled: []}
    plain()
    profiled()
    between.clear()
    thread_times.clear()
    generator = random.Random(0)
    for _ in range(num_pairs):
        for block in generator.sample((plain, profiled), 2):
            begin = time.perf_counter()
            block()
            seconds[block].append(time.perf_counter() - begin)
    ratio = ratio_interval(seconds[profiled], seconds[plain])
    print(f"steps with / without: {_show(ratio, '.4f')}, {num_pairs} pairs of {BLOCK_STEPS} steps")
    whole = sum(seconds[profiled])
    sampler, readings = sum(thread_times.values()) / whole, sum(between) / whole
    step = median_interval([taken / BLOCK_STEPS for taken in seconds[plain]]).median
    print(
        f"processor time while the steps ran ({step * 1e3:.1f} ms each): the sampling thread {sampler:.3%} of a core, "
        f"a step's readings {readings:.3%} ({_show(median_interval(between).scaled(1e6), '.0f')} us); "
        f"both {sampler + readings:.3%}"
    )


def _watch_sampler(profiler: Any) -> dict[int, float]:
    """Return, by its number, the processor time of each sampling thread up to its latest reading; filled as it goes."""
    found: dict[int, float] = {}
    numbers = itertools.count()
    local = threading.local()
    read = profiler._reader.read

    def watched(*, fresh: bool) -> Any:
        reading = read(fresh=fresh)
        if threading.current_thread().name == "memory-sampler":
            if not hasattr(local, "number"):
                local.number = next(numbers)
            found[local.number] = time.thread_time()
        return reading

    profiler._reader.read = watched
    return found


def peers(num_rounds: int, folder: str) -> None:
    """Print how much longer the program takes under each profiler, each run against the plain one of its round."""
    for name, text in (("plain", TIMED), ("profiled", PROFILED)):
        Path(folder, f"{name}.py").write_text(PROGRAM + text.format(steps=PEER_STEPS, folder=folder))
    plain = f"{folder}/plain.py"
    commands = {"plain": [plain], "mlxflow": [f"{folder}/profiled.py"]}
    if importlib.util.find_spec("memray"):
        commands["memray"] = ["-m", "memray", "run", "-q", "-f", "-o", f"{folder}/out.bin", plain]
    if importlib.util.find_spec("scalene"):
        commands["scalene"] = ["-m", "scalene", "run", "-o", f"{folder}/out.json", plain]
    generator = random.Random(0)
    rounds: list[dict[str, float]] = []
    for _ in range(num_rounds):
        order = generator.sample(list(commands), len(commands))
        rounds.append({name: taken for name in order if (taken := _seconds(commands[name]))})
    for name in ("mlxflow", "memray", "scalene"):
        pairs = [(one[name], one["plain"]) for one in rounds if name in one and "plain" in one]
        if pairs:
            print(f"under {name}: {_show(ratio_interval(*zip(*pairs, strict=True)), '.3f')} times, {len(pairs)} rounds")
        else:
            print(f"under {name}: {'did not run' if name in commands else 'not installed'}")


def _seconds(command: Iterable[str]) -> float | None:
    """Return the seconds that the program tells; what a profiler does after it, perhaps for minutes, is cut short."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = (line.strip() for line in process.stdout)
        found = next((float(line) for line in lines if line.replace(".", "", 1).isdigit()), None)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return found


def _show(interval: Interval, form: str) -> str:
    return f"{interval.median:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="of short blocks, with and without; default: 100")
    parser.add_argument("--rounds", type=int, default=7, help="runs under each profiler; default: 7")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paired(parsed.pairs, folder)
        peers(parsed.rounds, folder)


if __name__ == "__main__":
    main()
