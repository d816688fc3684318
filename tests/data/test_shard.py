from pathlib import Path

import numpy as np
import pytest
import xxhash

from mlxflow.data import shard as shard_module
from mlxflow.data.shard_cache import ShardStore
from tests.data.test_shard_cache import KEYS, write


def test_a_shard_is_read_as_written(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "shards")
    assert store.find(KEYS[0]) is None
    write(store, KEYS[0], ["a", "bb", "a"])
    shard = store.find(KEYS[0])
    assert shard is not None
    assert (shard.num_documents, shard.num_tokens, shard.blank, shard.bad) == (3, 9, 2, [(9, "bad")])
    assert shard.read("tokens").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert shard.read("tokens", 2, 5).tolist() == [0, 1, 1]
    documents = shard.documents()
    assert documents.sizes.tolist() == [1, 2, 1]
    assert documents.lengths.tolist() == [3, 3, 3]
    assert documents.places.tolist() == [1, 2, 3]
    hashes = documents.hashes
    assert (hashes[0] == hashes[2]).all()
    assert int(hashes[1, 0]) == int.from_bytes(xxhash.xxh3_128_digest(b"bb")[:8], "big")


def test_tokens_are_read_in_parts_that_hold_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_SPAN_TOKENS", 7)
    shard = write(ShardStore(tmp_path), KEYS[0], list("abcdefg"))
    parts = list(shard.token_spans(shard.documents().lengths))
    assert [(first, end) for first, end, _ in parts] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert np.concatenate([tokens for _, _, tokens in parts]).tolist() == shard.read("tokens").tolist()
    monkeypatch.setattr(shard_module, "_SPAN_TOKENS", 1)  # every document is longer than a part
    assert len(list(shard.token_spans(shard.documents().lengths))) == 7
