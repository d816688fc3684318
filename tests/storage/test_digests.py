import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.storage import report_files, state_files, tensor_writing
from mlxflow.storage.digests import DigestCache, _Stamp, digest_file, digest_json


def _cache(folder: Path) -> DigestCache:
    return DigestCache(folder / "digests.json")


TENSORS = {"b": mx.arange(6).reshape(2, 3), "a": mx.ones((4,), mx.bfloat16)}


def _write(path: Path, tensors: dict[str, mx.array] = TENSORS, **metadata: str) -> Path:
    tensor_writing.write_tensors(path, tensors, metadata)
    return path


def test_equal_tensors_have_equal_digests_for_every_writer(tmp_path: Path) -> None:
    first = _write(tmp_path / "1.safetensors", mlxflow="by one stage")
    second = tmp_path / "2.safetensors"
    mx.save_safetensors(str(second), TENSORS)  # in the order of insertion
    assert first.read_bytes() != second.read_bytes()
    assert digest_file(first).identity == digest_file(second).identity
    assert digest_file(first).content != digest_file(second).content


@pytest.mark.parametrize(
    "other",
    [
        {"b": TENSORS["b"], "c": TENSORS["a"]},
        {"b": TENSORS["b"], "a": TENSORS["a"].astype(mx.float32)},
        {"b": TENSORS["b"].reshape(3, 2), "a": TENSORS["a"]},
        {"b": TENSORS["b"] + 1, "a": TENSORS["a"]},
        {"b": TENSORS["b"]},
    ],
    ids=["name", "dtype", "shape", "content", "number"],
)
def test_a_tensor_is_its_name_type_shape_and_content(tmp_path: Path, other: dict[str, mx.array]) -> None:
    first = digest_file(_write(tmp_path / "1.safetensors"))
    second = digest_file(_write(tmp_path / "2.safetensors", other))
    assert first.identity != second.identity


def test_metadata_that_readers_use_is_part_of_the_identity(tmp_path: Path) -> None:
    first = digest_file(_write(tmp_path / "1.safetensors", context_length="64"))
    second = digest_file(_write(tmp_path / "2.safetensors", context_length="128"))
    assert first.identity != second.identity


def test_digests_of_reports_leave_out_run_specific_values(tmp_path: Path) -> None:
    def report(loss: float, seconds: float) -> str:
        path = tmp_path / "report.toml"
        report_files.write_report(path, {"loss": loss, "run": {"seconds": seconds}})
        return digest_file(path).identity

    assert report(1.0, 2.0) == report(1.0, 3.0)
    assert report(1.0, 2.0) != report(1.5, 2.0)


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1])
def test_a_change_of_any_byte_changes_the_digest(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * size)
    first = digest_file(path)
    path.write_bytes(b"x" * size + b"y")
    assert digest_file(path) != first
    if size:
        path.write_bytes(b"x" * (size - 1) + b"y")
        assert digest_file(path) != first


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.safetensors")
    now = path.stat().st_ctime_ns
    monkeypatch.setattr("time.time_ns", lambda: now + 10**9)
    cache = _cache(tmp_path)
    first = cache.digests(path)
    assert cache.digests(path) == first
    assert cache.files_read == 1
    cache.save()
    later = _cache(tmp_path)
    assert later.digests(path) == first
    assert later.files_read == 0
    assert later.digests(path, again=True) == first
    assert later.files_read == 1


def test_a_recently_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.safetensors")
    monkeypatch.setattr("time.time_ns", lambda: path.stat().st_ctime_ns)
    cache = _cache(tmp_path)
    cache.digests(path)
    cache.digests(path)
    assert cache.files_read == 2


class _Clock:
    """Time as a test sets it, and a file system whose times are whole seconds, or run ahead of ours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *, step_ns: int = 1, ahead_ns: int = 0) -> None:
        self.now = path.stat().st_ctime_ns // 10**9 * 10**9 + 600_000_000
        real = _Stamp.of

        def stamp(stat: os.stat_result) -> _Stamp:
            mtime, ctime = ((time + ahead_ns) // step_ns * step_ns for time in (stat.st_mtime_ns, stat.st_ctime_ns))
            return real(stat)._replace(mtime_ns=mtime, ctime_ns=ctime)

        monkeypatch.setattr("time.time_ns", lambda: self.now)
        monkeypatch.setattr(_Stamp, "of", staticmethod(stamp))


def _num_read(folder: Path, path: Path) -> int:
    """Return how often a run reads a file."""
    cache = _cache(folder)
    cache.digests(path)
    cache.digests(path)
    cache.save()
    return cache.files_read


def test_on_coarse_timestamps_a_recent_file_is_read_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.safetensors")
    clock = _Clock(monkeypatch, path, step_ns=10**9)
    assert _num_read(tmp_path, path) == 2  # a same-size edit of now would not show
    clock.now += 2 * 10**9
    assert _num_read(tmp_path, path) == 1
    assert _num_read(tmp_path, path) == 0


def test_a_same_size_edit_within_the_same_second_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    stat = path.stat()
    monkeypatch.setattr(_Stamp, "of", staticmethod(lambda _: _Stamp(3, second, second, stat.st_ino)))
    second = stat.st_ctime_ns // 10**9 * 10**9
    monkeypatch.setattr("time.time_ns", lambda: second + 1_900_000_000)
    cache = _cache(tmp_path)
    first = cache.digests(path)
    cache.save()
    path.write_bytes(b"two")
    monkeypatch.setattr("time.time_ns", lambda: second + 3_000_000_000)
    assert _cache(tmp_path).digests(path) != first


@pytest.mark.parametrize("seconds", [1, 2**31 - 1, 4_000_000_000])
def test_a_file_of_any_date_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    path = _write(tmp_path / "a.safetensors")
    os.utime(path, (seconds, seconds))
    now = path.stat().st_ctime_ns + 30_000_000
    monkeypatch.setattr("time.time_ns", lambda: now)
    assert _num_read(tmp_path, path) == 1
    assert _num_read(tmp_path, path) == 0


def test_on_a_file_system_whose_clock_runs_ahead_files_are_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.safetensors")
    clock = _Clock(monkeypatch, path, ahead_ns=3600 * 10**9)
    assert _num_read(tmp_path, path) == 2
    clock.now += 2 * 10**9
    assert _num_read(tmp_path, path) == 1
    assert _num_read(tmp_path, path) == 0


def test_a_change_is_detected_although_size_and_mtime_are_restored(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    cache = _cache(tmp_path)
    first, stat = cache.digests(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.digests(path) != first


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"\xff", b'{"format": 1}', b'{"format": 1, "files": {"a": []}}', b"[]"]
)
def test_a_damaged_digest_cache_only_causes_reading_again(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "digests.json").write_bytes(garbage)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert _cache(tmp_path).digests(path) == digest_file(path)


def _remembered(folder: Path) -> tuple[Path, Path]:
    """Return a file, and the cache that knows it."""
    path = folder / "a"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    cache = _cache(folder)
    cache.digests(path)
    cache.save()
    return path, folder / "digests.json"


def test_every_flipped_byte_of_the_cache_is_detected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = _remembered(tmp_path)
    data = file.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        cache = _cache(tmp_path)
        assert cache.digests(path) == digest_file(path)
        assert cache.files_read == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    file.write_bytes(flipped)
    _cache(tmp_path).save()
    said = f"{file}: not valid state (its bytes do not fit its checksum). Files are read again.\n"
    assert capsys.readouterr().err == said
    assert _cache(tmp_path).files_read == 0
    assert capsys.readouterr().err == ""


STORED: dict[str, object] = {
    "files are a list": {"files": [], "computed": {}},
    "an entry is a table": {"files": {"a": {}}, "computed": {}},
    "an entry is short": {"files": {"a": [1, 2]}, "computed": {}},
    "a digest is a list": {"files": {"a": [1, 2, 3, 4, "x", []]}, "computed": {}},
    "a stamp is true": {"files": {"a": [1, 2, 3, True, "x", "x"]}, "computed": {}},
    "a doubt is text": {"files": {"a": [1, 2, 3, 4, "x", "x", "y"]}, "computed": {}},
    "what was computed is a number": {"files": {}, "computed": {"a": ["x", 1]}},
}


@pytest.mark.parametrize("case", STORED)
def test_a_cache_with_wrong_types_counts_as_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (tmp_path / "digests.json").write_bytes(state_files.encode(STORED[case]))  # type: ignore[arg-type]
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert _cache(tmp_path).digests(path) == digest_file(path)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_cache_of_an_earlier_version_is_replaced_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digests.json").write_text('{"format": 1, "files": {}, "computed": {}}')
    _cache(tmp_path).save()
    assert state_files.read(tmp_path / "digests.json") == {"files": {}, "computed": {}}
    assert capsys.readouterr().err == ""


def test_digests_of_removed_files_are_dropped(tmp_path: Path) -> None:
    path, file = _remembered(tmp_path)
    other = tmp_path / "other"
    other.write_bytes(b"two")
    path.unlink()
    cache = _cache(tmp_path)
    cache.digests(other)
    cache.save()
    assert list(state_files.read(file)["files"]) == [str(other)]


def test_the_order_of_keys_does_not_count_and_the_type_of_values_does() -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": "1"})


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 9]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 4]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 4]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}},
        {"a": {"dtype": "U8", "shape": [4]}},
        {"a": 3},
        [],
        {"a": {"data_offsets": [0, 3]}, "b": {"data_offsets": [2, 4]}},
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(
        ValueError, match=r"it has|does not begin|has no valid data_offsets|not a table|of type|unknown type"
    ):
        digest_file(path)


def test_array_digests_depend_on_content_only(tmp_path: Path) -> None:
    tensor_writing.write_arrays(tmp_path / "1.safetensors", {"a": np.arange(4, dtype=np.float32)}, {})
    _write(tmp_path / "2.safetensors", {"a": mx.arange(4, dtype=mx.float32)})
    assert digest_file(tmp_path / "1.safetensors").identity == digest_file(tmp_path / "2.safetensors").identity
