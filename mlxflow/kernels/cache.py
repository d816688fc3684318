"""What is known of layers from earlier processes, in the user's cache folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxflow.storage.cache_files import add_entries, read_table
from mlxflow.storage.locks import device_lock

# Layer detections kept; the oldest, of versions long gone, are dropped first
_MAX_LAYERS = 4096


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
    add_entries(layers_file(), entries, most=_MAX_LAYERS)
