"""What the memory profiler costs: the same training steps with it and without it, in turns.

    python benchmarks/profiler.py [--rounds 30]

Prints the median of the ratios with an interval, the sampling thread's share of a core, and, where they are installed,
the time that memray and scalene take for the same program.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlxflow import cpu

PROGRAM = """
from mlxflow import cpu
cpu.prepare()
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
TIMED = "run()\nbegin = time.perf_counter()\nfor _ in range(80): run()\nprint(time.perf_counter() - begin)\n"


def paired(num_rounds: int) -> None:
    """Time blocks of steps with and without the profiler in turns."""
    cpu.prepare()
    from mlxflow.measurement.memory import MemoryProfiler, profile_memory

    names: dict[str, object] = {}
    exec(PROGRAM, names)  # noqa: S102 - the program that the peers run, too
    run = names["run"]
    assert callable(run)
    profiler = MemoryProfiler()

    def plain() -> None:
        for _ in range(20):
            run()

    def profiled() -> None:
        with profiler.sampling():
            for _ in range(20):
                with profile_memory(profiler, "step"):
                    run()
                profiler.end_step()

    plain()
    profiled()
    ratios = []
    for number in range(num_rounds):
        order = (plain, profiled) if number % 2 else (profiled, plain)
        took = {}
        for block in order:
            begin = time.perf_counter()
            block()
            took[block] = time.perf_counter() - begin
        ratios.append(took[profiled] / took[plain])
    ratios.sort()
    low, high = ratios[num_rounds // 4], ratios[num_rounds * 3 // 4]
    print(f"with / without: {statistics.median(ratios):.4f} (middle half {low:.4f} to {high:.4f}, {num_rounds} rounds)")


def thread_share() -> None:
    """Print what the sampling thread takes of a core while nothing else runs, and what a step's readings take."""
    from mlxflow.measurement.memory import MemoryProfiler, profile_memory

    profiler = MemoryProfiler()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with profiler.sampling():
        time.sleep(10)
    share = (time.process_time() - cpu_begin) / (time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in range(1000):
        with profile_memory(profiler, "step"):
            pass
        profiler.end_step()
    each = (time.perf_counter() - begin) / 1000
    print(f"sampling thread: {share:.2%} of a core; a phase and a step's end: {each * 1e6:.0f} us")


def peers() -> None:
    """Print how much longer the program takes under other profilers."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM + TIMED)
        commands = {
            "memray": ["-m", "memray", "run", "-q", "-f", "-o", f"{folder}/out.bin"],
            "scalene": ["-m", "scalene", "run", "-o", f"{folder}/out.json"],
        }
        ratios: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(5):
            plain = _seconds([str(program)])
            for name, command in commands.items():
                took = (
                    _seconds([*command, str(program)])
                    if shutil.which(name, path=str(Path(sys.executable).parent))
                    else None
                )
                if took and plain:
                    ratios[name].append(took / plain)
        for name, found in ratios.items():
            print(f"{name}: " + (f"{statistics.median(found):.2f} times" if found else "not installed, or did not run"))


def _seconds(command: list[str]) -> float | None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    numbers = [line for line in done.stdout.splitlines() if line.replace(".", "", 1).isdigit()]
    return float(numbers[-1]) if numbers else None


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    parsed = parser.parse_args()
    paired(parsed.rounds)
    thread_share()
    peers()


if __name__ == "__main__":
    main()
