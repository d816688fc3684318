"""Pack a stage's artifact and record into a tar file, and unpack one after checking every byte."""

import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.messages.os_errors import advise_on, naming
from mlxflow.storage import atomic_folders, temporary_files
from mlxflow.storage.digests import digest_file
from mlxflow.storage.ownership import foreign_names
from mlxflow.storage.state_files import InvalidStateError, parse_json
from mlxflow.tasks.tar_members import ArchiveError, TarMember, compression, members
from mlxflow.workflow.outputs import may_hold
from mlxflow.workflow.records import read_values
from mlxflow.workflow.stage_node import Node

_RECORD = "record.json"
_FORMAT = 1
_LARGEST_RECORD_BYTES = 32_000_000
# The most lists and tables in a record: a parsed one takes about 20 times the memory of its text.
_MOST_CONTAINERS = 500_000
_CHUNK_BYTES = 1 << 22


def pack(node: Node, values: dict[str, Any], file: Path) -> None:
    """Write a stage's artifact and record as an uncompressed tar file; equal artifacts are equal bytes.

    Args:
        node: the stage.
        values: its record, which matches the artifact.
        file: the archive; replaced atomically.

    Raises:
        ArtifactError: the record is too large to be unpacked again.
    """
    record = json.dumps({"format": _FORMAT, "task": node.task, "values": values}, sort_keys=True).encode()
    if _is_too_large(record):
        raise ArtifactError(f"{node.task}: its record has {len(record):,} bytes, more than an archive can hold.")
    temporary = temporary_files.beside(file)
    temporary_files.remove_orphans(file.parent, f".{file.name}.")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_member(_RECORD, len(record)), io.BytesIO(record))
            for name in sorted(values["outputs"]):
                with open(node.path(name), "rb") as content:  # noqa: PTH123
                    archive.addfile(_member(name, values["outputs"][name][0]), content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _is_too_large(record: bytes) -> bool:
    return len(record) > _LARGEST_RECORD_BYTES or record.count(b"[") + record.count(b"{") > _MOST_CONTAINERS


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member


def unpack(file: Path, nodes: dict[str, Node]) -> tuple[Node, dict[str, Any]]:
    """Install the artifact of an archive after checking every byte; return the stage and its record.

    Files are written only into a private folder, and only under names that the workflow knows.

    Raises:
        ArtifactError: the archive is damaged, hostile, of another version or of a stage that is not in the workflow;
            the existing artifact is unchanged.
        StageError: the disk has too little space.
    """
    try:
        with _opened(file) as archive:
            tar_members = members(archive)
            node, values = _read_record(file, archive, next(tar_members, None), nodes)
            _require_room(file, node, values)
            folder = node.root / node.folder
            keep = partial(foreign_names, folder, node.output_names)
            with atomic_folders.publishing(folder, keep) as private, naming(file):
                _extract(file, archive, tar_members, node, values, private)
            for copy, original in node.copies.items():
                atomic_folders.write_whole(node.root / copy, (node.root / original).read_bytes())
    except ArchiveError as error:
        raise ArtifactError(f"{file}: {error}. Nothing was unpacked.") from error
    return node, values


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Open an archive; a pipe is refused without blocking.

    Raises:
        ArtifactError: it is missing, no regular file, cannot be read, or is compressed.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing. Name a file that doit pack wrote.") from error
    except OSError as error:
        advice = advise_on(error, "Name a file that doit pack wrote")
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}). {advice}.") from error
    with ExitStack() as opened, naming(file):
        opened.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtifactError(f"{file}: is no regular file. Name a file that doit pack wrote.")
        opened.pop_all()
    with naming(file), open(descriptor, "rb") as archive:  # noqa: PTH123
        if method := compression(archive):
            raise ArtifactError(f"{file}: is compressed with {method}. Decompress it first.")
        yield archive


def _read_record(
    file: Path, archive: BinaryIO, member: TarMember | None, nodes: dict[str, Node]
) -> tuple[Node, dict[str, Any]]:
    if member is None or member.name != _RECORD or member.size > _LARGEST_RECORD_BYTES:
        raise ArtifactError(f"{file}: does not begin with a record. Name a file that doit pack wrote.")
    archive.seek(member.offset)
    data = archive.read(member.size)
    try:
        record = {} if _is_too_large(data) else parse_json(data)
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ArtifactError(f"{file}: was packed by another version. Pack it again with this one.")
        task, values = record.get("task"), read_values(record.get("values"))
    except InvalidStateError as error:
        raise ArtifactError(f"{file}: its record is not valid ({error}). Pack it again.") from error
    if not isinstance(task, str) or task not in nodes:
        raise ArtifactError(f"{file}: holds {task!r}, which is no stage here. Known: {', '.join(nodes)}.")
    node, outputs = nodes[task], values["outputs"]
    if not set(node.outputs) <= outputs.keys() or not all(_may_write(node, name) for name in outputs):
        raise ArtifactError(f"{file}: holds other files than {task} writes here. Pack it again with this version.")
    return node, values


def _may_write(node: Node, name: str) -> bool:
    return may_hold(node, name) and not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name


def _require_room(file: Path, node: Node, values: dict[str, Any]) -> None:
    needed = sum(size for size, _ in values["outputs"].values())
    place = node.root / node.folder
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if needed > free:
        raise StageError(f"{file}: needs {needed:,} bytes, {free:,} are free in {node.root}. Make room.")


def _extract(
    file: Path, archive: BinaryIO, tar_members: Iterator[TarMember], node: Node, values: dict[str, Any], private: Path
) -> None:
    missing = set(values["outputs"])
    for member in tar_members:
        if member.name not in missing:
            raise ArtifactError(
                f"{file}: holds {member.name!r}, which is no file of {node.task}. Nothing was unpacked."
            )
        missing.remove(member.name)
        size, content = values["outputs"][member.name]
        if member.size != size:
            raise ArtifactError(f"{file}: {member.name} has {member.size:,} bytes, its record says {size:,}.")
        target = private / Path(member.name).relative_to(node.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(file, archive, member, target)
        _verify(file, member.name, target, content)
    if missing:
        raise ArtifactError(f"{file}: lacks {', '.join(sorted(missing))}. Pack it again.")


def _copy(file: Path, archive: BinaryIO, member: TarMember, target: Path) -> None:
    archive.seek(member.offset)
    remaining = member.size
    with naming(target), target.open("wb") as written:
        while remaining:
            with naming(file):
                chunk = archive.read(min(remaining, _CHUNK_BYTES))
            if not chunk:
                raise ArchiveError("was cut off while it was read")
            written.write(chunk)
            remaining -= len(chunk)


def _verify(file: Path, name: str, path: Path, content: str) -> None:
    try:
        digest = digest_file(path).content
    except ValueError as error:
        raise ArtifactError(f"{file}: {name} is damaged ({error}). Nothing was unpacked.") from error
    if digest != content:
        raise ArtifactError(f"{file}: {name} is not what its record says. Nothing was unpacked.")
