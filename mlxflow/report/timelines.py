"""Read memory timelines: finished ones, the readable part of damaged ones, and those of interrupted runs."""

import fcntl
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from mlxflow.messages.advice import advise_build
from mlxflow.storage import layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST_BYTES = 256_000_000
_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_PHASE_COLUMNS = ("phase_number", "phase_begin_seconds", "phase_end_seconds", "phase_peak_memory_bytes")


class Span(NamedTuple):
    """One pass through a phase."""

    name: str
    begin_seconds: float
    end_seconds: float
    peak_bytes: float


class Timeline(NamedTuple):
    """The columns and phases of a memory timeline, as far as they can be read, and the problem of the file.

    Attributes:
        columns: by name.
        phases: in the order in which they ended.
        problem: a sentence; empty for none.
        ended: in a few words how and where an interrupted run ended; empty for a finished run.
    """

    columns: "dict[str, NDArray[Any]]"
    problem: str
    phases: tuple[Span, ...] = ()
    ended: str = ""


def read_timeline(path: Path) -> Timeline:
    """Return the columns of a safetensors file; of a truncated one, the existing part of each."""
    import numpy as np

    shown = f"{path.parent.name}/{path.name}"
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
    except OSError as error:
        return Timeline({}, f"{shown} cannot be read ({error.strerror}).")
    except (ValueError, RecursionError):
        return Timeline({}, f"{shown} is damaged: its header cannot be read. {advise_build('profile')}")
    columns, cut = {}, []
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            one_dimension = len(entry["shape"]) == 1 and 0 <= begin <= end
            expected_bytes = int(entry["shape"][0]) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            cut.append(name)
            continue
        if not one_dimension or expected_bytes != end - begin:
            cut.append(name)
            continue
        part = data[8 + length + begin : 8 + length + end]
        if len(part) < expected_bytes:
            cut.append(name)
        columns[name] = np.frombuffer(part[: len(part) // dtype.itemsize * dtype.itemsize], dtype).astype(np.float64)
    problem = f"{shown} is damaged or was cut off in {', '.join(cut)}; the existing part is shown." if cut else ""
    return Timeline(columns, problem, _phases(columns, header.get("__metadata__")))


def _phases(columns: "dict[str, NDArray[Any]]", metadata: object) -> tuple[Span, ...]:
    """Return the phases of a finished timeline."""
    try:
        names = json.loads(metadata["phases"])  # type: ignore[index]
        rows = zip(*(columns[name].tolist() for name in _PHASE_COLUMNS), strict=False)
        return tuple(Span(str(names[int(number)]), *rest) for number, *rest in rows if number >= 0)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):
        return ()


def read_cut_off(unfinished: Path, report: Path) -> Timeline | None:
    """Return the timeline of the stage's latest run if it did not finish; None if it did.

    Args:
        unfinished: the folder of the stage's unfinished runs, one subfolder for each configuration.
        report: of the stage's artifact; older runs are ignored.
    """
    try:
        times = {path: path.stat().st_mtime_ns for path in sorted(unfinished.glob(f"*/{layout.TIMELINE_JOURNAL}"))}
        latest = max(times, key=lambda path: times[path], default=None)
        if latest is None or (report.exists() and report.stat().st_mtime_ns >= times[latest]):
            return None
        with latest.open("rb") as file:
            runs = _is_held(file)
            lines = file.read(_LARGEST_BYTES).splitlines()
    except OSError:
        return None
    return _replay(lines, runs=runs)


def _is_held(file: BinaryIO) -> bool:
    """Return whether the process that writes a journal is still running."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


class _Replayed:
    """The state of a run after some lines of its journal."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[list[float]] = []
        self.samples: list[list[float]] = []
        self.phases: list[Span] = []
        self.entered: list[tuple[str, float]] = []
        self.closed = False

    def take(self, line: bytes) -> None:
        """Process one line.

        Raises:
            ValueError: it is torn or invalid; TypeError and IndexError mean the same.
        """
        kind, *values = json.loads(line)
        if kind == "columns":
            self.names = [str(name) for name in values]
        elif kind == "step" and len(values) == 1 + len(self.names):
            self.steps.append([float(value) for value in values])
        elif kind == "sample" and len(values) == len(self.names):
            self.samples.append([float(value) for value in values])
        elif kind == "enter":
            self.entered.append((str(values[0]), float(values[1])))
        elif kind == "phase":
            name, begin, end, peak = values
            self.entered.remove((str(name), float(begin)))
            self.phases.append(Span(str(name), float(begin), float(end), float(peak)))
        self.closed = self.closed or kind == "end"

    def columns(self) -> "dict[str, NDArray[Any]]":
        """Return every column by name; samples have a prefix."""
        import numpy as np

        columns: dict[str, NDArray[Any]] = {}
        tables = (("", ["step", *self.names], self.steps), ("sample_", self.names, self.samples))
        for prefix, head, table in tables:
            array = np.array(table, np.float64).reshape(len(table), len(head))
            columns |= {prefix + name: array[:, index] for index, name in enumerate(head)}
        return columns

    def all_phases(self) -> list[Span]:
        """Return every phase; an unfinished one lasts until the last reading."""
        seconds = [row[0] for row in self.samples] + [row[1] for row in self.steps]
        seconds += [phase.end_seconds for phase in self.phases] + [begin for _, begin in self.entered]
        last = max(seconds, default=0.0)
        return self.phases + [Span(name, begin, max(begin, last), 0.0) for name, begin in self.entered]

    def end_of_run(self, *, runs: bool) -> str:
        """Return in a few words how and where the run ended."""
        where = f"in {self.entered[-1][0]}" if self.entered else ""
        after = f"after step {int(self.steps[-1][0])}" if self.steps else "before the first step's end"
        how = "is still running" if runs else "failed or was stopped" if self.closed else "was cut off"
        return " ".join(word for word in (how, where, after) if word)


def _replay(lines: list[bytes], *, runs: bool) -> Timeline:
    """Return the timeline of a journal; a torn line is left out."""
    replayed = _Replayed()
    for line in lines:
        try:
            replayed.take(line)
        except (ValueError, TypeError, IndexError, RecursionError):
            continue
    return Timeline(replayed.columns(), "", tuple(replayed.all_phases()), replayed.end_of_run(runs=runs))
