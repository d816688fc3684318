"""What the disk, gzip and zstd can do to a file while its bytes are read."""

import contextlib
import gzip
import os
import pwd
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from mlxflow.data import decompression
from mlxflow.data.decompression import FileProblem, read_pieces
from mlxflow.messages.errors import SourceError
from mlxflow.storage.digests import digest_file

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def _ignore(_: int) -> None:
    pass


def _pieces(path: Path, compression: str, on_read: Callable[[int], None] = _ignore) -> Iterator[bytes]:
    digest = digest_file(path).content
    return read_pieces(path, compression=compression, expected_digest=digest, on_read=on_read)


def _read(path: Path, compression: str) -> bytes:
    return b"".join(_pieces(path, compression))


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(data)
    return path


def _problem(path: Path, compression: str) -> str:
    with pytest.raises(FileProblem) as caught:
        _read(path, compression)
    return str(caught.value)


def _refusal(path: Path, compression: str = "") -> str:
    with pytest.raises(SourceError) as caught:
        list(read_pieces(path, compression=compression, expected_digest="", on_read=_ignore))
    return str(caught.value)


def _some_bytes(generator: random.Random) -> bytes:
    return generator.choice(
        [
            b"",
            generator.randbytes(generator.randrange(3000)),
            bytes(generator.randrange(300_000)),
            b"some words " * generator.randrange(500),
        ]
    )


# --- bytes that come back


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("compression", COMPRESS)
def test_decompression_is_exact_for_any_number_of_members_and_piece_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, seed: int
) -> None:
    generator = random.Random(seed)
    monkeypatch.setattr(decompression, "PIECE_BYTES", generator.choice([1, 7, 1000, 1 << 20]))
    parts = [_some_bytes(generator) for _ in range(generator.randrange(6))]
    path = _write(tmp_path, b"".join(map(COMPRESS[compression], parts)))
    counted: list[int] = []
    assert b"".join(_pieces(path, compression, counted.append)) == b"".join(parts)
    assert sum(counted) == path.stat().st_size


@pytest.mark.parametrize("seed", range(20))
def test_zstd_frames_may_lack_their_size_have_checksums_and_be_skipped(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    stored, expected = b"", b""
    for _ in range(5):
        compressor = zstandard.ZstdCompressor(
            level=generator.choice([1, 19]),
            write_checksum=generator.random() < 0.5,
            write_content_size=generator.random() < 0.5,
        )
        data = _some_bytes(generator)
        skipped = generator.randbytes(generator.choice([0, 5, 3000]))
        magic = 0x184D2A50 + generator.randrange(16)  # of a frame that holds no content
        stored += compressor.compress(data) + struct.pack("<II", magic, len(skipped)) + skipped
        expected += data
    assert _read(_write(tmp_path, stored), "zst") == expected


@pytest.mark.parametrize("compression", COMPRESS)
def test_pieces_have_the_requested_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    monkeypatch.setattr(decompression, "PIECE_BYTES", 1000)
    path = _write(tmp_path, COMPRESS[compression](random.Random(0).randbytes(10_500)))
    *whole, last = [len(piece) for piece in _pieces(path, compression)]
    assert whole
    assert last == 500 or compression == "zst"
    assert all(size >= 1000 if compression == "zst" else size == 1000 for size in whole)


def test_zeros_after_a_gzip_stream_are_padding(tmp_path: Path) -> None:
    assert _read(_write(tmp_path, gzip.compress(b"text") + bytes(500)), "gz") == b"text"


@pytest.mark.parametrize("compression", COMPRESS)
def test_an_empty_file_has_no_pieces(tmp_path: Path, compression: str) -> None:
    assert list(_pieces(_write(tmp_path, b""), compression)) == []


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_caller_can_stop_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    monkeypatch.setattr(decompression, "PIECE_BYTES", 100)
    path = _write(tmp_path, COMPRESS[compression](random.Random(0).randbytes(200_000)))
    pieces = read_pieces(path, compression=compression, expected_digest="not asked for", on_read=_ignore)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # an open file would warn, and warnings are errors


# --- files that are not there, or not the same


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_that_grows_while_it_is_read_is_an_error(tmp_path: Path, compression: str) -> None:
    more = COMPRESS[compression](b"more")
    path = _write(tmp_path, COMPRESS[compression](random.Random(0).randbytes(3 << 20)))
    pieces = _pieces(path, compression)
    next(pieces)
    with path.open("ab") as file:
        file.write(more)
    with pytest.raises(SourceError) as caught:
        list(pieces)
    assert str(caught.value) == f"{path}: changed while it was read. Run the stage again."


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_missing_compressed_file_is_an_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "gone"
    assert _refusal(path, compression) == f"{path}: vanished before it was read. Run the stage again."


def test_decompressing_a_folder_is_an_error(tmp_path: Path) -> None:
    assert _refusal(tmp_path) == (
        f"{tmp_path}: cannot be read (Is a directory). Fix it or leave it out of the sources."
    )


@contextlib.contextmanager
def _without_privileges() -> Iterator[None]:
    """Be somebody who may not read everything: root may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


def test_a_file_without_read_permission_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path, b"text")
    path.chmod(0)
    with _without_privileges():
        told = _refusal(path)
    assert told == f"{path}: cannot be read (Permission denied). Fix it or leave it out of the sources."


# --- files that cannot be inflated


@pytest.mark.parametrize("keep", [5, 20, 5000, -9, -8, -1])
def test_a_truncated_gzip_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path, gzip.compress(random.Random(0).randbytes(10_000))[:keep])
    assert _problem(path, "gz") == f"ends before its gzip stream does (byte {path.stat().st_size:,})"


@pytest.mark.parametrize("keep", [1, 5, 20, 5000, -5, -4, -1])
def test_a_truncated_zstd_file_is_an_error(tmp_path: Path, keep: int) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    whole = compressor.compress(random.Random(0).randbytes(10_000))
    path = _write(tmp_path, whole[:keep])
    assert _problem(path, "zst") == f"ends before its zstd frame does (byte {path.stat().st_size:,})"
    path.write_bytes(whole + whole[:keep])
    assert _problem(path, "zst") == f"ends before its zstd frame does (byte {path.stat().st_size:,})"


def test_a_file_that_is_no_gzip_file_is_an_error(tmp_path: Path) -> None:
    assert _problem(_write(tmp_path, b"plain text"), "gz") == "is no valid gzip file (Not a gzipped file (b'pl'))"
    assert _problem(_write(tmp_path, gzip.compress(b"a") + b"tail"), "gz") == (
        "is no valid gzip file (Not a gzipped file (b'ta'))"
    )
    damaged = bytearray(gzip.compress(random.Random(0).randbytes(1000)))
    damaged[500] ^= 1
    assert _problem(_write(tmp_path, bytes(damaged)), "gz").startswith("is no valid gzip file (CRC check failed ")


def test_a_file_that_is_no_zstd_file_is_an_error(tmp_path: Path) -> None:
    expected = "is no valid zstd file (zstd decompressor error: Unknown frame descriptor)"
    assert _problem(_write(tmp_path, b"plain text"), "zst") == expected
    assert _problem(_write(tmp_path, zstandard.compress(b"a") + b"tail"), "zst") == expected
    damaged = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(random.Random(0).randbytes(1000)))
    damaged[500] ^= 1
    assert _problem(_write(tmp_path, bytes(damaged)), "zst") == (
        "is no valid zstd file (zstd decompressor error: Restored data doesn't match checksum)"
    )


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_bomb_of_many_members_is_stopped_before_it_fills_memory(tmp_path: Path, compression: str) -> None:
    member = COMPRESS[compression](bytes(16_000_000))
    path = _write(tmp_path, member * 500)  # 8 GB
    passed: list[int] = []
    tracemalloc.start()
    try:
        with pytest.raises(FileProblem) as caught:
            passed.extend(map(len, _pieces(path, compression)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("inflates to over 400 times its size (")
    assert str(caught.value).endswith(" bytes and no end). Unpack it and check it")
    assert sum(passed) <= 1 << 26
    assert peak < 100_000_000


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_highly_compressible_log_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(decompression, "_FREE_INFLATION_BYTES", 0)
    lines = b"".join(b"%06d connection refused, trying again\n" % (i // 10) for i in range(100_000))
    assert _read(_write(tmp_path, COMPRESS[compression](lines)), compression) == lines
