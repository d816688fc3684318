"""Records of finished quantizations, by which later ones of the same kind are predicted."""

from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.storage import atomic_folders, state_files

# Of a file; raised when what is counted changes
_FORMAT = 4


class WorkRecord(NamedTuple):
    """By how much a finished run missed its prediction from products: factors of seconds and of bytes."""

    seconds: float
    held_bytes: float


def read_records(file: Path) -> dict[str, list[WorkRecord]]:
    """Return the records of earlier runs by method and device; none if the file is missing or not valid."""
    try:
        content: Any = state_files.read(file)
        if content["format"] != _FORMAT:
            return {}
        return {
            str(name): [WorkRecord(float(seconds), float(size)) for seconds, size in rows if min(seconds, size) > 0]
            for name, rows in content["records"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_records(file: Path, records: dict[str, list[WorkRecord]]) -> None:
    """Write the records of runs by method and device."""
    content = {name: [list(one) for one in rows] for name, rows in records.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_folders.write_whole(file, state_files.encode({"format": _FORMAT, "records": content}))
