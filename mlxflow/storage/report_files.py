"""Reader and writer of a stage's report.toml as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import naming
from mlxflow.storage import toml_text
from mlxflow.storage.atomic_folders import write_whole
from mlxflow.storage.regular_files import read_regular


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report of an artifact that is being published, as TOML.

    Values that differ between equal runs belong in its `[run]` table.
    """
    import tomli_w

    write_whole(path, tomli_w.dumps(report).encode(), is_published=True)


def read_report(path: Path) -> dict[str, Any]:
    """Return a report.

    Raises:
        ArtifactError: it is missing or no valid TOML.
    """
    try:
        with naming(path):
            return toml_text.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing. Build it again.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error}). Remove it and build it again.") from error
