"""What trials found, kept in the user's cache: a file behind its digest, so that a damaged one counts as empty."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxflow.storage import artifact_files
from mlxflow.storage.locks import device_lock

# Findings that are kept: those of versions long gone make room
_MOST = 4096


def file() -> Path:
    """Return where findings are kept: in the user's cache folder."""
    return device_lock().with_name("findings.json")


def key_of(*parts: str) -> str:
    """Return the key of what depends on all of these texts."""
    return hashlib.sha256("\n".join(f"{len(part)} {part}" for part in parts).encode()).hexdigest()


def read() -> dict[str, Any]:
    """Return what was found, by its key; nothing where the file is not there or damaged."""
    try:
        digest, _, data = file().read_bytes().partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return {}
        found = json.loads(data)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(found: Mapping[str, Any]) -> None:
    """Add what was found; where nothing can be written it is found anew next time.

    Of two processes that keep something at once, one may lose what it found, and finds it anew.

    Args:
        found: JSON values by key.
    """
    merged = list(({key: value for key, value in read().items() if key not in found} | dict(found)).items())
    data = json.dumps(dict(merged[-_MOST:]), indent=1).encode()
    with suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        artifact_files.write_whole(file(), hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
