"""Pack a stage's artifact and record into a tar file, and unpack one after checking every byte."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import advise_on, naming
from mlxflow.storage import temporary_files
from mlxflow.tasks import packed_record
from mlxflow.tasks.tar_members import ArchiveError, TarMember, compression, members
from mlxflow.workflow.stage_node import Node

_RECORD = "record.json"
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
    record = packed_record.encode(node, values)
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
            with packed_record.installing(node, values, str(file)) as private, naming(file):
                _extract(file, archive, tar_members, node, values, private)
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
    if member is None or member.name != _RECORD or member.size > packed_record.LARGEST_BYTES:
        raise ArtifactError(f"{file}: does not begin with a record. Name a file that doit pack wrote.")
    archive.seek(member.offset)
    try:
        return packed_record.decode(archive.read(member.size), nodes)
    except packed_record.InvalidRecordError as error:
        raise ArtifactError(f"{file}: {error}") from error


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
        if damage := packed_record.damage_of(target, content):
            raise ArtifactError(f"{file}: {member.name} {damage}. Nothing was unpacked.")
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
