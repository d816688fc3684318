"""Archives that are damaged or hostile: each is refused with one line, in little memory, and nothing changes."""

import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks import packed_record
from mlxflow.tasks.archive import pack, unpack
from mlxflow.workflow.outputs import observe_outputs
from mlxflow.workflow.stage_node import Node

A, LONG = "artifacts/train/a", "artifacts/train/" + "long/" * 30 + "b.safetensors"


class Packed(NamedTuple):
    """A stage, the archive that it was packed into, and what lies in its folder."""

    node: Node
    file: Path

    def unpack(self) -> tuple[Node, dict[str, Any]]:
        return unpack(self.file, {"train": self.node})

    def assert_refused(self, said: str) -> None:
        before = self._files()
        with pytest.raises(ArtifactError) as caught:
            self.unpack()
        assert str(caught.value) == f"{self.file}: {said}"
        assert self._files() == before

    def _files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.node.root.rglob("*") if path.is_file()}


def _tensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    node = Node("train", "", tmp_path / "job", "artifacts/train", (), (A, LONG), {"seed": 0}, ())
    for name, data in ((A, b"x" * 1000), (LONG, _tensors(b"y" * 64))):
        path = Path(node.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    values = {"settings": {"seed": 0}, "inputs": {"source": "0af1"}, "seconds": 0.5, "device": "cpu", "commit": "?"}
    file = tmp_path / "train.tar"
    pack(node, {**values, "outputs": observe_outputs(node, DigestCache(tmp_path / "digests.json"))}, file)
    return Packed(node, file)


def test_packed_files_are_unpacked_including_long_names(packed: Packed) -> None:
    expected = {name: Path(packed.node.path(name)).read_bytes() for name in (A, LONG)}
    for name in expected:
        Path(packed.node.path(name)).unlink()
    node, values = packed.unpack()
    assert {name: Path(node.path(name)).read_bytes() for name in (A, LONG)} == expected
    assert list(values) == ["settings", "inputs", "outputs", "seconds", "device", "commit"]


# --- members

Members = list[tuple[tarfile.TarInfo, bytes]]


def _rewrite(path: Path, change: Callable[[Members], None], format_: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path) as opened:
        members = [(m, content.read() if (content := opened.extractfile(m)) else b"") for m in opened.getmembers()]
    change(members)
    with tarfile.open(path, "w", format=format_) as opened:
        for member, data in members:
            opened.addfile(member, io.BytesIO(data))


def _renamed(name: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[1][0].name = name

    return change


def _of_kind(kind: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[1][0].type, members[1][0].linkname, members[1][0].size = kind, "../../source", 0

    return change


def _with_header(key: str, value: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[1][0].pax_headers = {key: value}

    return change


def _with_content(index: int, edit: Callable[[bytes], bytes]) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[index] = (members[index][0], edit(members[index][1]))
        members[index][0].size = len(members[index][1])

    return change


def _record(edit: Callable[[dict[str, Any]], object]) -> Callable[[Members], None]:
    def changed(data: bytes) -> bytes:
        record = json.loads(data)
        edit(record)
        return json.dumps(record).encode()

    return _with_content(0, changed)


def _values(**fields: object) -> Callable[[Members], None]:
    return _record(lambda record: record["values"].update(fields))


def _nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


KIND = "Nothing was unpacked."
OTHER_FILES = "holds other files than train writes here. Pack it again with this version."
INVALID = "its record is not valid ({}). Pack it again."
HOSTILE: dict[str, tuple[Callable[[Members], None], str]] = {
    "absolute path": (_renamed("/etc/passwd"), f"holds '/etc/passwd', which is no file of train. {KIND}"),
    "path upwards": (_renamed("../../x"), f"holds '../../x', which is no file of train. {KIND}"),
    "symbolic link": (_of_kind(tarfile.SYMTYPE), f"holds '{A}', which is a link. {KIND}"),
    "hard link": (_of_kind(tarfile.LNKTYPE), f"holds '{A}', which is a link. {KIND}"),
    "character device": (_of_kind(tarfile.CHRTYPE), f"holds '{A}', which is a device. {KIND}"),
    "block device": (_of_kind(tarfile.BLKTYPE), f"holds '{A}', which is a device. {KIND}"),
    "pipe": (_of_kind(tarfile.FIFOTYPE), f"holds '{A}', which is a pipe. {KIND}"),
    "folder": (_of_kind(tarfile.DIRTYPE), f"holds '{A}', which is a folder. {KIND}"),
    "contiguous file": (
        _of_kind(tarfile.CONTTYPE),
        f"holds '{A}', which is of a kind that doit pack does not write. {KIND}",
    ),
    "sparse by header": (
        _with_header("GNU.sparse.realsize", "20000000000"),
        f"holds a header with 'GNU.sparse.realsize', which doit pack does not write. {KIND}",
    ),
    "owner": (_with_header("uname", "x"), f"holds a header with 'uname', which doit pack does not write. {KIND}"),
    "long header": (
        _with_header("path", "x" * 70_000),
        f"holds a header of long names that doit pack does not write. {KIND}",
    ),
    "a file twice": (lambda members: members.append(members[1]), f"holds '{A}', which is no file of train. {KIND}"),
    "no file": (lambda members: members.pop(1) and None, f"lacks {A}. Pack it again."),
    "no record": (
        lambda members: members.pop(0) and None,
        "does not begin with a record. Name a file that doit pack wrote.",
    ),
    "other content": (
        _with_content(1, lambda data: b"!" + data[1:]),
        f"{A} is not what its record says. {KIND}",
    ),
    "tensors whose header lies": (
        _with_content(2, lambda data: (2**40).to_bytes(8, "little") + data[8:]),
        f"{LONG} is damaged (its header is cut off, or it is no safetensors file). {KIND}",
    ),
    "another size": (
        _record(lambda record: record["values"]["outputs"].update({A: [999, "0a"]})),
        f"{A} has 1,000 bytes, its record says 999.",
    ),
    "files upwards": (_record(lambda record: record["values"]["outputs"].update({"../x": [1, "0a"]})), OTHER_FILES),
    "files upwards from inside": (
        _record(lambda record: record["values"]["outputs"].update({"artifacts/train/../x.py": [1, "0a"]})),
        OTHER_FILES,
    ),
    "another stage": (
        _record(lambda record: record.update(task="s9\x1b[31m")),
        "holds 's9\\x1b[31m', which is no stage here. Known: train.",
    ),
    "a list for a stage": (
        _record(lambda record: record.update(task=["train"])),
        "holds ['train'], which is no stage here. Known: train.",
    ),
    "another version": (
        _record(lambda record: record.update(format=2)),
        "was packed by another version. Pack it again with this one.",
    ),
    "record is a list": (
        _with_content(0, lambda data: b"[1]"),
        "was packed by another version. Pack it again with this one.",
    ),
    "record is no JSON": (_with_content(0, lambda data: data[:-1]), INVALID.format("no valid JSON")),
    "record is nested": (_with_content(0, lambda data: b"[" * 400_000), INVALID.format("no valid JSON")),
    "record is not a number": (_values(seconds=float("nan")), INVALID.format("no valid JSON")),
    "values are a list": (_record(lambda record: record.update(values=[1])), INVALID.format("no table")),
    "settings are a list": (_values(settings=[]), INVALID.format("settings: expected a table of settings")),
    "settings are null": (_values(settings=None), INVALID.format("settings: expected a table of settings")),
    "a setting is null": (_values(settings={"a": None}), INVALID.format("settings: expected a table of settings")),
    "settings are nested": (
        _values(settings={"a": _nested(200)}),
        INVALID.format("settings: expected a table of settings"),
    ),
    "a setting is huge": (_values(settings={"a": 10**30}), INVALID.format("settings: expected a table of settings")),
    "inputs are null": (_values(inputs=None), INVALID.format("inputs: expected a digest for each name")),
    "an input is a number": (_values(inputs={"a": 1}), INVALID.format("inputs: expected a digest for each name")),
    "an input is no digest": (
        _values(inputs={"a": "\x1b]0;x"}),
        INVALID.format("inputs: expected a digest for each name"),
    ),
    "outputs are null": (_values(outputs=None), INVALID.format("outputs: expected [bytes, digest] for each name")),
    "no outputs": (_values(outputs={}), INVALID.format("outputs: expected [bytes, digest] for each name")),
    "an infinite size": (
        _values(outputs={A: [float("inf"), "0a"]}),
        INVALID.format("outputs: expected [bytes, digest] for each name"),
    ),
    "a negative size": (
        _values(outputs={A: [-1, "0a"]}),
        INVALID.format("outputs: expected [bytes, digest] for each name"),
    ),
    "a size that is true": (
        _values(outputs={A: [True, "0a"]}),
        INVALID.format("outputs: expected [bytes, digest] for each name"),
    ),
    "an output of three": (
        _values(outputs={A: [1, "0a", 2]}),
        INVALID.format("outputs: expected [bytes, digest] for each name"),
    ),
    "infinite seconds": (_values(seconds=float("inf")), INVALID.format("seconds: expected a number of seconds")),
    "seconds are text": (_values(seconds="1"), INVALID.format("seconds: expected a number of seconds")),
    "seconds are true": (_values(seconds=True), INVALID.format("seconds: expected a number of seconds")),
    "device is a table": (_values(device={}), INVALID.format("device: expected text")),
    "commit is a number": (_values(commit=1), INVALID.format("commit: expected text")),
    "no settings": (_record(lambda record: record["values"].pop("settings")), INVALID.format("settings: missing")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_and_changes_nothing(packed: Packed, kind: str) -> None:
    change, said = HOSTILE[kind]
    _rewrite(packed.file, change)
    packed.assert_refused(said)


def test_gnu_headers_of_long_names_are_refused_however_many_there_are(packed: Packed) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 20
    block = header.tobuf(tarfile.GNU_FORMAT) + b"artifacts/train/a\0".ljust(512, b"\0")
    data = packed.file.read_bytes()
    packed.file.write_bytes(block * 2000 + data)
    packed.assert_refused(f"holds '././@LongLink', which is of a kind that doit pack does not write. {KIND}")


def test_pax_headers_of_long_names_one_after_the_other_are_refused(packed: Packed) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 12
    block = header.tobuf(tarfile.USTAR_FORMAT) + b"12 path=abc\n".ljust(512, b"\0")
    packed.file.write_bytes(block * 2000 + packed.file.read_bytes())
    packed.assert_refused(f"holds a header of long names that doit pack does not write. {KIND}")


def test_a_sparse_member_that_would_fill_the_disk_is_refused(packed: Packed) -> None:
    with tarfile.open(packed.file) as opened:
        record = opened.extractfile("record.json")
        assert record is not None
        values = json.loads(record.read())
    values["values"]["outputs"][A] = [20_000_000_000, "0a"]
    text = json.dumps(values).encode()
    first, sparse = tarfile.TarInfo("record.json"), tarfile.TarInfo(A)
    first.size, sparse.type = len(text), tarfile.GNUTYPE_SPARSE
    block = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % 20_000_000_000
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:512]))
    packed.file.write_bytes(
        first.tobuf(tarfile.GNU_FORMAT) + text.ljust(-(-len(text) // 512) * 512, b"\0") + block + bytes(1024)
    )
    assert packed.file.stat().st_size < 5000
    with pytest.raises(ArtifactError) as caught:
        packed.unpack()
    assert str(caught.value) == f"{packed.file}: holds '{A}', which is a sparse file. {KIND}"


def test_an_archive_larger_than_the_free_space_is_refused_before_writing(packed: Packed) -> None:
    _rewrite(packed.file, _record(lambda record: record["values"]["outputs"].update({A: [2**62, "0a"]})))
    with pytest.raises(StageError) as caught:
        packed.unpack()
    size = r"[\d.,]+ (?:[kMG]B|bytes)"
    pattern = rf"{packed.file}: needs {size}, {size} are free in {packed.node.root}\. Make room\."
    assert re.fullmatch(pattern, str(caught.value))


@pytest.mark.parametrize("length", range(1, 10_240, 487))
def test_an_archive_that_is_cut_off_is_refused(packed: Packed, length: int) -> None:
    data = packed.file.read_bytes()
    packed.file.write_bytes(data[:length])
    if data[length:].strip(b"\0"):
        with pytest.raises(ArtifactError, match=rf"^{packed.file}: .+$"):
            packed.unpack()
    else:
        packed.unpack()


@pytest.mark.parametrize("position", range(0, 6000, 331))
def test_a_flipped_byte_is_refused_or_changes_nothing(packed: Packed, position: int) -> None:
    expected = Path(packed.node.path(A)).read_bytes(), Path(packed.node.path(LONG)).read_bytes()
    data = bytearray(packed.file.read_bytes())
    data[position % len(data)] ^= 0x11
    packed.file.write_bytes(data)
    with suppress(ArtifactError):
        packed.unpack()
    assert (Path(packed.node.path(A)).read_bytes(), Path(packed.node.path(LONG)).read_bytes()) == expected


# --- what is no archive

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "bzip2": lambda data: __import__("bz2").compress(data),
    "xz": lambda data: __import__("lzma").compress(data),
}


@pytest.mark.parametrize("method", COMPRESSED)
def test_a_compressed_archive_is_never_decompressed(packed: Packed, method: str) -> None:
    packed.file.write_bytes(COMPRESSED[method](bytes(1_000_000)))
    packed.assert_refused(f"is compressed with {method}. Decompress it first.")


def test_pipes_devices_and_folders_are_refused_as_archives(packed: Packed, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ArtifactError) as caught:
            unpack(place, {"train": packed.node})
        assert str(caught.value) == f"{place}: is no regular file. Name a file that doit pack wrote."


def test_a_record_that_could_not_be_unpacked_is_not_packed(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, values = packed.unpack()
    monkeypatch.setattr(packed_record, "LARGEST_BYTES", 100)
    with pytest.raises(ArtifactError, match=r"^train: its record has [\d,]+ bytes, more than an archive can hold\.$"):
        pack(packed.node, values, tmp_path / "other.tar")
    assert not (tmp_path / "other.tar").exists()
