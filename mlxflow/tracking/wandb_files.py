"""Read the transaction log of a wandb run, `run-ID.wandb`: what an earlier process of a run has written.

wandb has no reader of it in Python. The file has a header of 7 bytes and then the log format of LevelDB (blocks of 32
KiB; each record with a checksum, a length and a type: whole, first, middle or last part) of messages of
`wandb.proto.wandb_internal_pb2.Record`.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
_RECORD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class LoggedRun(NamedTuple):
    """What a run's files have.

    Attributes:
        rows: of the history, by name of the metric.
        summary: the last value of each key that was set in the summary.
        config: the last value of each key of the settings.
        has_ended: whether a process of the run has ended as it should.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    has_ended: bool

    def last_steps(self) -> dict[str, int]:
        """Return the last step of each metric."""
        last: dict[str, int] = {}
        for row in self.rows:
            step = int(row.get("_step", -1))
            last |= {name: max(step, last.get(name, -1)) for name in row if not name.startswith("_")}
        return last


def read_run(paths: list[Path]) -> LoggedRun:
    """Return what the files of a run have; a torn end of a file is left out.

    Args:
        paths: its files, oldest first.
    """
    from wandb.proto import wandb_internal_pb2

    run = LoggedRun([], {}, {}, has_ended=False)
    for path in paths:
        for data in records(path.read_bytes()):
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "history":
                    run.rows.append(_values(record.history.item))
                case "summary":
                    run.summary.update(_values(record.summary.update))
                case "config":
                    run.config.update(_values(record.config.update))
                case "run":
                    run.config.update(_values(record.run.config.update))
                case "exit":
                    run = run._replace(has_ended=True)
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in wandb's format, up to a torn end.

    Args:
        data: its content.
    """
    position, parts = _HEADER_BYTES, b""
    while position + _RECORD.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _RECORD.size:  # padding of a block
            position += left
            continue
        _, length, kind = _RECORD.unpack_from(data, position)
        begin = position + _RECORD.size
        position = begin + length
        if position > len(data) or not _WHOLE <= kind <= _LAST:
            return
        parts = data[begin:position] if kind in (_WHOLE, _FIRST) else parts + data[begin:position]
        if kind in (_WHOLE, _LAST):
            yield parts
