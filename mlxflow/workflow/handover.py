"""What doit hands to a stage's process: the workflow as doit resolved it, and the inputs as doit found them.

The process reads it from its standard input. It looks at no workflow file, so an edit of that file, or of a folder of
sources, after doit has decided changes nothing of a run; the next doit finds it.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlxflow.errors import StageError


class Basis(NamedTuple):
    """What a workflow was resolved from.

    Attributes:
        text: of the workflow file.
        lookups: what was asked of the disk, with the answers; see `mlxflow.workflow.disk_queries`.
    """

    text: str
    lookups: list[Any]


class Handover(NamedTuple):
    """What a stage runs with.

    Attributes:
        basis: of the workflow.
        settings: of the stage, as they will be recorded.
        inputs: identity by the name to record; None where the run is not recorded.
    """

    basis: Basis
    settings: dict[str, Any]
    inputs: dict[str, str] | None

    def as_bytes(self) -> bytes:
        """Return it in the form that `receive` reads."""
        text = json.dumps([list(self.basis), self.settings, self.inputs], ensure_ascii=False)
        return text.encode(errors="surrogateescape")  # names as bytes: the stage's process may spell them otherwise

    def check(self, task: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Compare it with what the stage's process finds.

        Raises:
            StageError: they differ; one line for each difference.
        """
        lines = []
        if json.loads(json.dumps(settings)) != self.settings:
            lines.append(f"{task}: mlxflow or MLX was changed since doit began. Run doit again.")
        if self.inputs is not None:
            names = sorted({*inputs, *self.inputs})
            differing = [name for name in names if inputs.get(name) != self.inputs.get(name)]
            lines += [f"{name}: changed since doit looked at it for {task}. Run doit again." for name in differing]
        if lines:
            raise StageError("\n".join(lines))


def receive() -> Handover | None:
    """Return what doit wrote to the standard input of this process; None where it wrote nothing."""
    data = sys.stdin.buffer.read() if sys.stdin else b""
    if not data:
        return None
    basis, settings, inputs = json.loads(data.decode(errors="surrogateescape"))
    return Handover(Basis(*basis), settings, inputs)
