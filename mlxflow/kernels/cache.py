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
from mlxflow.storage.locks import device_lock

_DIGEST_BYTES = hashlib.sha256().digest_size

# Layer detections kept; the oldest, of versions long gone, are dropped first
_MAX_LAYERS = 4096


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


def layers_file() -> Path:
    """Return the file of layer detections."""
    return device_lock().with_name("findings.json")


def key_of(*parts: str) -> str:
    """Return the key of an entry that depends on all of these texts."""
    return hashlib.sha256("\n".join(f"{len(part)} {part}" for part in parts).encode()).hexdigest()


def read_layers() -> dict[str, Any]:
    """Return the layer detections, by `key_of`."""
    return read_table(layers_file())


def add_layers(entries: Mapping[str, Any]) -> None:
    """Add layer detections.

    Args:
        entries: JSON values by `key_of`.
    """
    entries_to_write = {key: value for key, value in read_layers().items() if key not in entries} | dict(entries)
    write_table(layers_file(), dict(list(entries_to_write.items())[-_MAX_LAYERS:]))
