"""Cache files in the user's cache folder: a digest, then the payload, so that a damaged file counts as empty.

A file that cannot be written is ignored: its content is computed again next time. Of two processes that write at once
one may lose its entries; the file stays whole.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxflow.storage import atomic_folders

_DIGEST_BYTES = hashlib.sha256().digest_size


def read_payload(path: Path) -> bytes | None:
    """Return the payload of a cache file; None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def write_payload(path: Path, payload: bytes) -> None:
    """Write a cache file atomically; ignore errors of writing."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_folders.write_whole(path, hashlib.sha256(payload).digest() + payload)


def read_table(path: Path) -> dict[str, Any]:
    """Return the JSON object of a cache file; an empty one if the file is missing, damaged or holds something else."""
    try:
        table = json.loads(read_payload(path) or b"{}")
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON object to a cache file; ignore errors of writing."""
    write_payload(path, json.dumps(dict(table), indent=1).encode())


def add_entries(path: Path, entries: Mapping[str, Any], *, most: int) -> None:
    """Add entries to the JSON object of a cache file as the newest; the oldest of more than `most` are dropped."""
    kept = {key: value for key, value in read_table(path).items() if key not in entries}
    write_table(path, dict([*kept.items(), *entries.items()][-most:]))
