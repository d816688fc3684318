"""A run as TensorBoard's event files, written by tensorboardX.

A process that continues a run writes a file of its own, without the points that the older files have. No file is
removed or changed: a TensorBoard that is open would not notice.
"""

import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlxflow.storage import paths
from mlxflow.tracking.tracked_run import FINAL, CurvePoint, Scalar, TrackedRun, numbers_of

_NAMES = "events.out.tfevents.*"

# A record: its length, a checksum of that, the data, a checksum of them
_LENGTH, _CHECKSUM_BYTES = struct.Struct("<Q"), 4


class TensorBoardRun:
    """The event files of a run; see `mlxflow.tracking.trackers.OpenRun`."""

    known: dict[str, int]
    known_of_all = -1

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._top = run.folder_of("tensorboard")
        self._folder = self._top / run.run_id
        scalars = [one for path in sorted(self._folder.glob(_NAMES)) for one in read_scalars(path.read_bytes())]
        self.known = {}
        for one in scalars:
            self.known[one.name] = max(one.step, self.known.get(one.name, -1))
        self._final = {one.name: one.value for one in scalars if one.name.startswith(FINAL)}
        self._last_step = max(self.known.values(), default=0)
        self._opened: Any = None

    def _writer(self) -> Any:
        """Return the writer, made at the first call: a process with nothing new makes no file."""
        if self._opened is None:
            from tensorboardX import SummaryWriter

            # its `flush` leaves what its thread has not written yet: the thread itself flushes every second
            self._opened = SummaryWriter(str(self._folder), filename_suffix=f".{time.time_ns()}", flush_secs=1)
            rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in self._run.settings.items())
            table = f"| setting | value |\n|---|---|\n{rows}"
            self._opened.add_text("settings", table, 0, walltime=self._run.started)
        return self._opened

    def log(self, points: Sequence[CurvePoint]) -> None:
        """Write points to the file."""
        for point in points:
            wall = self._run.started + (point.seconds or 0)
            self._writer().add_scalar(point.name, point.value, point.step, walltime=wall)
            self._last_step = max(self._last_step, point.step)

    def finish(self, figures: Mapping[str, Scalar] | None) -> str:
        """Write final figures and the settings as hyperparameters, and close the file."""
        numbers = {_tag(f"{FINAL}{name}"): value for name, value in numbers_of(figures or {}).items()}
        if self._opened is not None or not numbers.keys() <= self._final.keys():
            from tensorboardX.summary import hparams

            for name in numbers.keys() - self._final.keys():
                self._writer().add_scalar(name, numbers[name], self._last_step)
            for summary in hparams(dict(self._run.settings), numbers):
                self._writer().file_writer.add_summary(summary)
            self._writer().close()
        return f"tensorboard --logdir {paths.shown(self._top)}"


def _cell(value: Scalar) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _tag(name: str) -> str:
    """Return a name with the characters replaced that tensorboardX replaces in the names of scalars."""
    return re.sub(r"[^-/\w.]", "_", name)


class LoggedScalar(NamedTuple):
    """A scalar of an event file."""

    name: str
    step: int
    value: float


def read_scalars(data: bytes) -> Iterator[LoggedScalar]:
    """Yield the scalars of an event file, up to a torn end.

    Args:
        data: its content.
    """
    from tensorboardX.proto import event_pb2

    position = 0
    while position + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        begin = position + _LENGTH.size + _CHECKSUM_BYTES
        position = begin + length + _CHECKSUM_BYTES
        if position > len(data):
            return
        event: Any = event_pb2.Event()
        event.ParseFromString(data[begin : begin + length])
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                yield LoggedScalar(value.tag, event.step, value.simple_value)
