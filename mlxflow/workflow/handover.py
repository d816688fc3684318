"""The data that doit passes to a stage's process: the resolved workflow and the identities of the inputs.

The process reads it from standard input and does not read the workflow file. An edit of that file or of a source folder
after doit has decided does not affect the run; the next doit notices it.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlxflow.messages.errors import StageError


class Basis(NamedTuple):
    """The data that a workflow was resolved from.

    Attributes:
        text: the content of the workflow file.
        lookups: the disk queries with their answers; see `mlxflow.workflow.disk_queries`.
    """

    text: str
    lookups: list[Any]


class Handover(NamedTuple):
    """The data for one run of a stage.

    Attributes:
        basis: of the workflow.
        settings: of the stage, as they are recorded.
        inputs: identity by recorded name; None if the run is not recorded.
    """

    basis: Basis
    settings: dict[str, Any]
    inputs: dict[str, str] | None

    def as_bytes(self) -> bytes:
        """Return the encoded data that `receive` reads."""
        text = json.dumps([list(self.basis), self.settings, self.inputs], ensure_ascii=False)
        return text.encode(errors="surrogateescape")  # keeps names that are no UTF-8

    def check(self, task: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Compare the data with the state that the stage's process finds.

        Raises:
            StageError: they differ; one line for each difference.
        """
        lines = []
        if json.loads(json.dumps(settings)) != self.settings:
            lines.append(f"{task}: mlxflow or MLX was changed since the build began. Build again.")
        if self.inputs is not None:
            names = sorted({*inputs, *self.inputs})
            differing = [name for name in names if inputs.get(name) != self.inputs.get(name)]
            lines += [f"{name}: changed since the build checked it for {task}. Build again." for name in differing]
        if lines:
            raise StageError("\n".join(lines))


def receive() -> Handover | None:
    """Return the data from this process's standard input; None if that is empty."""
    data = sys.stdin.buffer.read() if sys.stdin else b""
    if not data:
        return None
    basis, settings, inputs = json.loads(data.decode(errors="surrogateescape"))
    return Handover(Basis(*basis), settings, inputs)
