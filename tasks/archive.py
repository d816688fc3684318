"""One stage's artifact with its record as a file that moves between machines, believed only after a look."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from mlxflow import artifact
from mlxflow.errors import ArtifactError
from mlxflow.identity import digest_file
from mlxflow.ownership import foreign_names
from tasks.node import Node
from tasks.outputs import may_hold

_RECORD = "record.json"
_FORMAT = 1
_LARGEST_RECORD_BYTES = 64_000_000


def pack(node: Node, values: dict[str, Any], file: Path) -> None:
    """Write a stage's artifact and record as an uncompressed tar file; equal artifacts are equal bytes.

    Args:
        node: the stage.
        values: its record; the artifact is what it says.
        file: the archive, replaced whole.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    record = json.dumps({"format": _FORMAT, "task": node.task, "values": values}, sort_keys=True).encode()
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_member(_RECORD, len(record)), io.BytesIO(record))
            for name in sorted(values["outputs"]):
                with open(node.path(name), "rb") as content:  # noqa: PTH123
                    archive.addfile(_member(name, values["outputs"][name][0]), content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member


def unpack(file: Path, nodes: dict[str, Node]) -> tuple[Node, dict[str, Any]]:
    """Put an archive's artifact into its place after checking every byte; return the stage and its record.

    Nothing of the archive is written outside a private folder, and that only under the names that the workflow knows.

    Raises:
        ArtifactError: the archive is damaged, hostile, of another version or of a stage that is not in the workflow;
            what was there before is as it was.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            node, values = _read_record(file, archive, nodes)
            folder = node.root / node.folder
            with artifact.publishing(folder, keep=lambda: foreign_names(folder, node.output_names)) as private:
                _extract(file, archive, node, values, private)
            for copy, original in node.copies.items():
                artifact.write_whole(node.root / copy, (node.root / original).read_bytes())
    except (tarfile.TarError, EOFError) as error:
        raise ArtifactError(f"{file}: damaged ({error}). Pack it again.") from error
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing. Name a file that doit pack wrote.") from error
    return node, values


def _read_record(file: Path, archive: tarfile.TarFile, nodes: dict[str, Node]) -> tuple[Node, dict[str, Any]]:
    member = archive.next()
    if member is None or member.name != _RECORD or not member.isreg() or member.size > _LARGEST_RECORD_BYTES:
        raise ArtifactError(f"{file}: does not begin with a record. Name a file that doit pack wrote.")
    try:
        record = json.loads(_content(archive, member).read())
        version, task, values = record["format"], record["task"], record["values"]
        outputs = {str(name): (int(size), str(content)) for name, (size, content) in values["outputs"].items()}
        complete = {"settings", "inputs", "outputs", "seconds"} <= values.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file}: its record cannot be read. Pack it again.") from error
    if version != _FORMAT or not complete:
        raise ArtifactError(f"{file}: was packed by another version. Pack it again with this one.")
    if task not in nodes:
        raise ArtifactError(f"{file}: holds {task!r}, which is no stage here. Known: {', '.join(nodes)}.")
    node = nodes[task]
    if not set(node.outputs) <= set(outputs) or not all(may_hold(node, name) for name in outputs):
        raise ArtifactError(f"{file}: holds other files than {task} writes here. Pack it again with this version.")
    return node, values


def _extract(file: Path, archive: tarfile.TarFile, node: Node, values: dict[str, Any], private: Path) -> None:
    wanted = set(values["outputs"])
    while member := archive.next():
        if member.name not in wanted or not member.isreg():
            raise ArtifactError(f"{file}: holds {member.name!r}, which is no file of {node.task}. Nothing was taken.")
        wanted.remove(member.name)
        size, content = values["outputs"][member.name]
        if member.size != size:
            raise ArtifactError(f"{file}: {member.name} has {member.size:,} bytes, its record says {size:,}.")
        target = private / Path(member.name).relative_to(node.folder)
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as written:
            _copy(_content(archive, member), written)
        _verify(file, member.name, target, content)
    if wanted:
        raise ArtifactError(f"{file}: lacks {', '.join(sorted(wanted))}. Pack it again.")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    content = archive.extractfile(member)
    if content is None:  # not a regular file, which was asked before
        raise ArtifactError(f"{member.name}: has no content.")
    return content


def _copy(source: Any, target: Any) -> None:
    import shutil

    shutil.copyfileobj(source, target, 1 << 22)


def _verify(file: Path, name: str, path: Path, content: str) -> None:
    try:
        found = digest_file(path).content
    except ValueError as error:
        raise ArtifactError(f"{file}: {name} is damaged ({error}). Nothing was taken.") from error
    if found != content:
        raise ArtifactError(f"{file}: {name} is not what its record says. Nothing was taken.")
