"""Archives that are damaged or hostile, made by grammar: taken whole as their record says, or refused in one line."""

import io
import json
import tarfile
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.storage.digests import DigestCache, digest_file
from mlxflow.tasks.archive import pack, unpack
from mlxflow.workflow.outputs import observe_outputs
from mlxflow.workflow.records import check_values
from mlxflow.workflow.stage_node import Node
from tests.faults.grammar import VALUES, changed, spoilt

A, B = "artifacts/train/a", "artifacts/train/folder/" + "long/" * 30 + "b"
CONTENT = {A: b"x" * 1000, B: b"y" * 64}
VALUES_OF_RUN = {"settings": {"seed": 0}, "inputs": {"source": "0af1"}, "seconds": 0.5, "device": "cpu", "commit": "?"}

# What an archive of this size may take while it is read: the limits of a record and of a header, and some copies
_MOST_BYTES = 8_000_000

_NAMES = st.one_of(
    st.sampled_from(
        ["record.json", A, B, "../../source", "/etc/passwd", "artifacts/train/../../source", "artifacts/train", ""]
    ),
    st.text("a/.\0\x1b\n\udce9", max_size=8),
    st.just("n" * 5000),
)
_TYPES = st.sampled_from([tarfile.REGTYPE] * 6 + [bytes([kind]) for kind in (0, *range(48, 58), *b"LKSxgDMVX")])
_SIZES = st.one_of(st.just(-1), st.integers(0, 2000), st.sampled_from([2**31, 8**11 - 1, 2**63]))
_FIELDS = st.dictionaries(
    st.sampled_from(["path", "size", "linkpath", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "uid"]),
    st.sampled_from(["0", "9" * 30, "-1", "../../source", A, B, "1,2", "x" * 2000, "\u0661"]),
    max_size=2,
)


def _node(root: Path) -> Node:
    node = Node("train", "", root, "artifacts/train", (), (A, B), {"seed": 0}, ())
    for name, data in CONTENT.items():
        path = Path(node.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "source").write_bytes(b"a file of the user's")
    return node


def _packed() -> tuple[bytes, dict[str, Any]]:
    """Return an archive as it should be, and its record."""
    with tempfile.TemporaryDirectory() as folder:
        node = _node(Path(folder))
        values = VALUES_OF_RUN | {"outputs": observe_outputs(node, DigestCache(Path(folder) / "digests.json"))}
        pack(node, values, Path(folder) / "a.tar")
        return (Path(folder) / "a.tar").read_bytes(), {"format": 1, "task": "train", "values": values}


ARCHIVE, RECORD = _packed()


def _member(name: str, data: bytes, kind: bytes, size: int, fields: dict[str, str]) -> bytes:
    """Return header and content of a member that need not be what its header says."""
    member = tarfile.TarInfo(name)
    member.type, member.size, member.pax_headers = kind, max(0, size) if size >= 0 else len(data), fields
    header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@st.composite
def _members(draw: st.DrawFn) -> bytes:
    """Return an archive whose members may be of any name, kind, size and content, mostly after a record."""
    record = draw(st.one_of(st.just(RECORD), changed(RECORD), VALUES))
    parts = [("record.json", json.dumps(record).encode())] if draw(st.integers(0, 9)) else []
    parts += [(draw(st.one_of(st.just(name), _NAMES)), data) for name, data in CONTENT.items()]
    parts += [(draw(_NAMES), draw(st.binary(max_size=600))) for _ in range(draw(st.integers(0, 2)))]
    out = b""
    for name, data in parts:
        is_plain = draw(st.integers(0, 4)) > 0
        kind, size = (tarfile.REGTYPE, -1) if is_plain else (draw(_TYPES), draw(_SIZES))
        out += _member(name, data, kind, size, {} if is_plain else draw(_FIELDS))
    return out + bytes(draw(st.sampled_from([0, 512, 1024])))


@st.composite
def _spoilt_headers(draw: st.DrawFn) -> bytes:
    """Return an archive in whose headers bytes were replaced and the checksums made to fit again."""
    data = bytearray(ARCHIVE)
    starts = [offset for offset in range(0, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar"]
    for start in draw(st.lists(st.sampled_from(starts), min_size=1, max_size=3)):
        offset = start + draw(st.integers(0, 511))
        new = draw(
            st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"\x80", b"\xff" * 12, b"77777777777"]))
        )
        data[offset : min(start + 512, offset + len(new))] = new[: start + 512 - offset]
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def _unpack(file: Path, node: Node) -> tuple[dict[str, Any] | None, str]:
    """Return the record of an archive that was taken, or what its refusal said."""
    try:
        return unpack(file, {"train": node})[1], ""
    except (ArtifactError, StageError) as error:
        return None, str(error)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@given(st.one_of(spoilt(ARCHIVE), _members(), _spoilt_headers()))
def test_a_fuzzed_archive_is_unpacked_as_recorded_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "job"
        node, file = _node(root), Path(folder) / "a.tar"
        file.write_bytes(data)
        before = _contents(root)
        tracemalloc.start()
        values, said = _unpack(file, node)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < _MOST_BYTES
        if values is None:
            assert said.startswith(f"{file}: ")
            assert "\n" not in said
            assert _contents(root) == before
        else:
            check_values(values)
            outputs = {name: content for name, (_, content) in values["outputs"].items()}
            assert outputs.keys() == {name for name in _contents(root) if name != "source"}
            assert all(digest_file(root / name).content == content for name, content in outputs.items())
            assert (root / "source").read_bytes() == before["source"]
        assert sorted(path.name for path in Path(folder).iterdir()) == ["a.tar", "job"]


def test_the_archive_before_fuzzing_is_accepted(tmp_path: Path) -> None:
    node = _node(tmp_path)
    (tmp_path / "a.tar").write_bytes(ARCHIVE)
    assert unpack(tmp_path / "a.tar", {"train": node})[1] == RECORD["values"]
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
        assert archive.getnames() == ["record.json", A, B]
