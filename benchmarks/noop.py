"""What `doit` takes when there is nothing to do, against plain doit in turns in the same run.

    python benchmarks/noop.py [ROUNDS]

- empty: the tiny workflow of the tests, everything fresh, against doit on an empty dodo file;
- six: a chain of six stages that copy a file, against plain doit on the same chain;
- 1,001: as many stages of one source each, against plain doit;
- touched: a 2 GiB artifact with three readers is touched: the run after it and the one after that, against plain doit.

Whole processes, medians and the median of the ratios by round; each variant runs once before it counts. The processor
time says the same where other programs keep the machine busy.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

OURS = """
from pathlib import Path
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.creator import configuration, tasks_of
from mlxflow.workflow.stage_node import Node
state = Path("artifacts/.mlxflow")
cache = DigestCache(state / "digests.json")
root = Path(".")  # one for all stages, as in a graph that is read
nodes = [
    Node(task=name, doc="", root=root, folder="out", inputs=(read,), outputs=(written,), settings={{}},
         command=("cp", read, written))
    for name, read, written in {edges!r}
]
DOIT_CONFIG = configuration(nodes, state)
def task_stages():
    yield from tasks_of(nodes, cache)
"""

PLAIN = """
def task_stages():
    for name, read, written in {edges!r}:
        yield {{"basename": name, "actions": [["cp", read, written]], "file_dep": [read], "targets": [written]}}
"""


def main() -> None:
    """Print a line for each row."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    with tempfile.TemporaryDirectory() as scratch:
        compare_empty(Path(scratch, "empty"), rounds)
        six = [(f"s{i}", f"a.{i}", f"a.{i + 1}") for i in range(6)]
        compare_chain("six stages", Path(scratch, "six"), six, ["a.0"], 1000, rounds)
        many = [(f"s{i}", f"a.{i}", f"b.{i}") for i in range(1001)]
        compare_chain("1,001 stages", Path(scratch, "many"), many, [f"a.{i}" for i in range(1001)], 10, rounds)
        compare_touched(Path(scratch, "touched"))


def compare_empty(folder: Path, rounds: int) -> None:
    """Compare the real stages with an empty dodo file."""
    ours, plain = _folders(folder)
    shutil.copy(REPOSITORY / "dodo.py", ours)
    shutil.copy(REPOSITORY / "tests/tiny.toml", ours / "workflow.toml")
    (plain / "dodo.py").touch()
    _compare("nothing to do, against an empty dodo file", ours, plain, rounds)


def compare_chain(
    name: str, folder: Path, edges: list[tuple[str, str, str]], sources: list[str], size: int, rounds: int
) -> None:
    """Compare the same graph in both."""
    ours, plain = _folders(folder)
    _write_graphs(ours, plain, edges, sources, size)
    _compare(f"nothing to do, {name}", ours, plain, rounds)


def compare_touched(folder: Path) -> None:
    """Touch a large artifact, and look at the two runs after it."""
    ours, plain = _folders(folder)
    edges = [("make", "a", "big"), *((f"read{i}", "big", f"out{i}") for i in range(3))]
    _write_graphs(ours, plain, edges, ["a"], 2**31)
    for where in (ours, plain):
        for _ in range(2):
            _times(where)
        (where / "big").touch()
    first = (_times(ours), _times(plain))
    second = (_times(ours), _times(plain))
    _report("2 GiB artifact touched, three readers", [first])
    _report("... and the run after it", [second])


def _folders(folder: Path) -> tuple[Path, Path]:
    ours, plain = folder / "ours", folder / "plain"
    ours.mkdir(parents=True)
    plain.mkdir()
    return ours, plain


def _write_graphs(ours: Path, plain: Path, edges: list[tuple[str, str, str]], sources: list[str], size: int) -> None:
    for folder, text in ((ours, OURS), (plain, PLAIN)):
        (folder / "dodo.py").write_text(text.format(edges=edges))
        for number, source in enumerate(sources):
            with (folder / source).open("wb") as file:
                file.write(number.to_bytes(8, "little"))
                file.truncate(size)


def _compare(name: str, ours: Path, plain: Path, rounds: int) -> None:
    for where in (ours, ours, plain, plain):
        _times(where)
    _report(name, [(_times(ours), _times(plain)) for _ in range(rounds)])


def _times(folder: Path) -> tuple[float, float]:
    """Return the seconds, and the seconds of processor time, that one run takes."""
    command = [sys.executable, "-m", "doit"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin, before = time.perf_counter(), _processor_seconds()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    return time.perf_counter() - begin, _processor_seconds() - before


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _report(name: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    texts = []
    for which in range(2):
        columns = [(our[which], their[which]) for our, their in pairs]
        ours, plain = (statistics.median(column) for column in zip(*columns, strict=True))
        ratio = statistics.median(our / their for our, their in columns)
        texts.append(f"mlxflow {ours:6.3f} s   doit {plain:6.3f} s   ratio {ratio:5.2f}")
    print(f"{name:42} {texts[0]}   | processor: {texts[1]}", flush=True)


if __name__ == "__main__":
    main()
