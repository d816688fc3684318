"""The artifact that a stage repeats when it is built elsewhere for a comparison."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from mlxflow.storage import layout, report_structs


class _RepeatedOrigin(msgspec.Struct, frozen=True):
    settings_digest: str
    inputs_digest: str


class _RepeatedReport(msgspec.Struct, frozen=True):
    stage: _RepeatedOrigin


def repeated_artifact(folder: Path, provenance: Mapping[str, str]) -> Path | None:
    """Return the folder of a stage's artifact if it has the same settings and inputs; None otherwise.

    A stage that is repeated takes from it what was chosen by trials, such as kernels and recomputed layers: of other
    settings that would be wrong.

    Args:
        folder: of the artifact; need not exist.
        provenance: of the run.

    Raises:
        ArtifactError: the artifact's report is damaged.
    """
    file = folder / layout.REPORT
    if not file.is_file():
        return None
    origin = report_structs.read_part(file, _RepeatedReport, advice="Remove it and build it again.").stage
    own = _RepeatedOrigin(provenance["settings_digest"], provenance["inputs_digest"])
    return folder if origin == own else None
