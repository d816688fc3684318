import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mlxflow.data import shard as shard_module
from mlxflow.data import shard_cache
from mlxflow.data.shard import Shard
from mlxflow.data.shard_cache import ShardStore

KEYS = [xxhash.xxh3_128_hexdigest(str(i).encode()) for i in range(6)]


def write(store: ShardStore, key: str, texts: list[str], *, length: int = 3) -> Shard:
    """Write a shard of documents, each of `length` tokens that are its number, and return it."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    with store.write(key, np.dtype(np.uint16)) as writer:
        for i in range(0, len(texts), 2):  # in several parts
            some = texts[i : i + 2]
            writer.append(
                tokens=np.repeat(np.arange(i, i + len(some)), length).astype(np.uint16),
                documents=np.column_stack(
                    [
                        np.full(len(some), length, np.uint64),
                        np.frombuffer(digests, ">u8").reshape(-1, 2)[i : i + len(some)].astype(np.uint64),
                        np.array([len(text.encode()) for text in some], np.uint64),
                        np.arange(i + 1, i + 1 + len(some), dtype=np.uint64),
                        np.zeros((len(some), 2), np.uint64),
                    ]
                ),
            )
        writer.refuse(9, "bad")
        writer.summary.blank = 2
    return store.open(key)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_shard_counts_as_missing_and_is_removed(tmp_path: Path, damage: str) -> None:
    store = ShardStore(tmp_path)
    path = write(store, KEYS[0], ["a", "b"]).path
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "other": b"x" * 5000}[damage])
    assert store.find(KEYS[0]) is None
    assert not path.exists()


def test_a_shard_of_other_code_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path)
    write(store, KEYS[0], ["a"])
    monkeypatch.setattr(shard_module, "FORMAT", 99)
    assert store.find(KEYS[0]) is None


def test_an_unfinished_shard_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardStore(tmp_path).write(KEYS[0], np.dtype(np.uint8)) as writer:
            writer.append(tokens=np.zeros(5, np.uint8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def _kept(folder: Path) -> list[int]:
    return [i for i, key in enumerate(KEYS) if (folder / f"{key}.safetensors").exists()]


def test_unused_shards_are_removed_oldest_first_when_they_exceed_the_used_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_KEPT_UNUSED_BYTES", 0)
    store = ShardStore(tmp_path)
    for number in range(6):
        path = write(store, KEYS[number], ["a"]).path
        os.utime(path, (number, number))
    store.collect("pretokenize", KEYS, ["pretokenize"])
    assert store.collect("pretokenize", [KEYS[0], KEYS[1]], ["pretokenize"]) == 2
    assert _kept(tmp_path) == [0, 1, 4, 5]  # two in use, and as many bytes of the newest of the others
    assert store.collect("pretokenize", [KEYS[4]], ["pretokenize"]) == 2
    assert len(_kept(tmp_path)) == 2
    assert 4 in _kept(tmp_path)


def test_shards_of_another_stage_are_kept_while_the_stage_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_KEPT_UNUSED_BYTES", 0)
    store = ShardStore(tmp_path)
    for number in range(5):
        write(store, KEYS[number], ["a"])
    tasks = ["pretokenize:a", "pretokenize:b"]
    store.collect("pretokenize:a", KEYS[:3], tasks)
    store.collect("pretokenize:b", KEYS[3:4], tasks)
    assert set(_kept(tmp_path)) >= {0, 1, 2, 3}
    store.collect("pretokenize:b", KEYS[3:4], ["pretokenize:b"])
    assert len(_kept(tmp_path)) == 2


def test_shards_left_by_a_crash_are_removed(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    write(store, KEYS[0], ["a"])
    (tmp_path / ".x.1.partial").write_bytes(b"half")
    store.collect("pretokenize", KEYS[:1], ["pretokenize"])
    assert not (tmp_path / ".x.1.partial").exists()


NOTES = {
    "no JSON": b"{",
    "a list": b"[]",
    "stages that are numbers": b'{"runs": 1, "tasks": {"pretokenize": 3}, "used_in": {}, "stamps": {}}',
    "uses that are text": b'{"runs": 1, "tasks": {}, "used_in": {"a": "b"}, "stamps": {}}',
    "runs below zero": b'{"runs": -1, "tasks": {}, "used_in": {}, "stamps": {}}',
}


@pytest.mark.parametrize("case", NOTES)
def test_invalid_shard_notes_count_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    write(ShardStore(tmp_path), KEYS[0], ["one"])
    (tmp_path / "notes.json").write_bytes(NOTES[case])
    store = ShardStore(tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert store.find(KEYS[0]) is not None
    store.collect("pretokenize", [KEYS[0]], ["pretokenize"])
    assert ShardStore(tmp_path).find(KEYS[0]) is not None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("before", "after"), [(b'masked\\": 0', b'masked\\":{}'), (b'literals\\": 0', b'literals\\":[]')]
)
def test_a_shard_with_a_fact_of_another_type_counts_as_missing(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = write(ShardStore(tmp_path), KEYS[0], ["one"]).path
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    assert ShardStore(tmp_path).find(KEYS[0]) is None
