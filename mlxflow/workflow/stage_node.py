"""A stage as a node of doit's graph: names of its files, its settings and its command."""

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxflow.storage import layout
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.handover import Basis, Handover
from mlxflow.workflow.records import are_settings


@dataclass(frozen=True)
class Node:
    """One stage, or one variant of it.

    Attributes:
        task: `stage` or `stage:variant`.
        doc: the line that `doit list` prints.
        root: the workflow's folder; all names below are relative to it.
        folder: the artifact, as a name.
        inputs: names of the files read.
        outputs: names of the files written.
        settings: of the workflow file and the code that the artifact depends on, as JSON values.
        command: the process that runs the stage.
        corpora: names of built-in corpora read.
        beside: artifact folders whose files beside the model are read, too.
        spellings: how the names of inputs are recorded; see `mlxflow.storage.paths.record_name`.
        bound_device: the workflow's `device` if the artifact describes the machine it was made on.
        device: the workflow's `device`.
        uses_device: whether the stage computes on the device.
        threads: the workflow's `threads`; 0 for as many as the machine has processors.
        ranks: the processes that run the stage together, in words; empty for one.
        copies: names of copies of outputs, each with the output's name.
        measured: names of inputs and outputs that differ between equal runs, such as rates and a page that shows them.
        basis: the data that the workflow was resolved from; None without a workflow file.
    """

    task: str
    doc: str
    root: Path
    folder: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: dict[str, Any]
    command: tuple[str, ...]
    corpora: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    spellings: dict[str, str] = field(default_factory=dict)
    bound_device: str | None = None
    device: str = "auto"
    uses_device: bool = True
    threads: int = 0
    ranks: str = ""
    copies: dict[str, str] = field(default_factory=dict)
    measured: tuple[str, ...] = ()
    basis: Basis | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Keep the root as text: `path` is called for every file of a no-op `doit`."""
        root = os.fspath(self.root)
        object.__setattr__(self, "_prefix", root if root.endswith("/") else f"{root}/")

    def path(self, name: str) -> str:
        """Return the path of a file of the workflow from the current folder."""
        prefix: str = self.__dict__["_prefix"]
        return name if name.startswith("/") else prefix + name

    def handover(self, settings: dict[str, Any], inputs: dict[str, str] | None) -> bytes:
        """Return the standard input of the stage's process; see `mlxflow.workflow.handover`."""
        return Handover(self.basis, settings, inputs).as_bytes() if self.basis else b""

    @property
    def output_names(self) -> list[str]:
        """The names of the files written, relative to the artifact."""
        return [os.path.relpath(name, self.folder) for name in self.outputs]

    def as_json(self) -> dict[str, Any]:
        """Return the node as a JSON value, without its basis."""
        value = asdict(replace(self, basis=None)) | {"root": str(self.root)}
        del value["basis"]
        return value

    @classmethod
    def from_json(cls, value: object) -> "Node":
        """Return the node of a value from `as_json`.

        Raises:
            InvalidStateError: a field is missing or of another type, or an output lies outside of its artifact.
        """
        if not isinstance(value, dict) or value.keys() != _CHECKS.keys():
            raise InvalidStateError("expected the fields of a stage")
        for name, check in _CHECKS.items():
            if not check(value[name]):
                raise InvalidStateError(f"{name} of a stage is not valid")
        fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
        node = cls(**fields | {"root": _folder(value["root"])})
        if node.folder != layout.stage_folder(node.task).as_posix() or not node._writes_artifacts():
            raise InvalidStateError(f"{node.task!r} writes outside of its artifact")
        return node

    def _writes_artifacts(self) -> bool:
        """Return whether every file that the stage writes is inside of its folder."""
        own = ((name, self.folder) for name in self.outputs)
        written = (*own, *((name, layout.ARTIFACTS) for name in self.copies), (self.folder, layout.ARTIFACTS))
        return all(
            name.startswith(f"{folder}/") and not {"", ".", ".."}.intersection(name.split("/"))
            for name, folder in written
        )


@functools.cache
def _folder(name: str) -> Path:
    """Return the path of a folder: one object for all stages of a workflow."""
    return Path(name)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_pairs(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


_CHECKS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("task", "doc", "root", "folder", "device", "ranks"), _is_text),
    **dict.fromkeys(("inputs", "outputs", "command", "corpora", "beside", "measured"), _are_names),
    **dict.fromkeys(("spellings", "copies"), _are_pairs),
    "settings": are_settings,
    "bound_device": lambda value: value is None or isinstance(value, str),
    "uses_device": lambda value: isinstance(value, bool),
    "threads": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
}
