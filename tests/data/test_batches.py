from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mlxflow import artifact
from mlxflow.data.batches import batches, rows
from mlxflow.data.token_file import TokenFile
from mlxflow.errors import ArtifactError, SourceError


def test_rows_overlap_by_the_one_token_that_is_only_a_target() -> None:
    table = rows(np.arange(10, dtype=np.uint16), context_length=3)
    assert table.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_rows_are_a_view() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    table = rows(tokens, context_length=3)
    assert np.shares_memory(table, tokens)
    assert not table.flags.writeable


@pytest.mark.parametrize("length", [0, 1, 3])
def test_too_few_tokens_make_no_row(length: int) -> None:
    assert rows(np.arange(length, dtype=np.uint16), context_length=3).shape == (0, 4)


def test_an_epoch_holds_every_row_once_in_an_order_by_seed_and_epoch() -> None:
    table = rows(np.arange(31, dtype=np.uint16), context_length=3)
    drawn = [batch[:, 0].tolist() for batch in islice(batches(table, batch_size=5, seed=1), 4)]
    first, second = drawn[0] + drawn[1], drawn[2] + drawn[3]
    assert sorted(first) == sorted(second) == table[:, 0].tolist()
    assert first != second
    assert drawn == [batch[:, 0].tolist() for batch in islice(batches(table, batch_size=5, seed=1), 4)]
    assert drawn != [batch[:, 0].tolist() for batch in islice(batches(table, batch_size=5, seed=2), 4)]


def _token_file(path: Path, count: int) -> Path:
    metadata = {"context_length": "4", "vocab_size": "100", "end_of_text": "0"}
    arrays = {"tokens": np.arange(count, dtype=np.uint8), "document_offsets": np.array([0, count])}
    artifact.write_arrays(path, arrays, metadata)
    return path


def test_a_token_file_is_mapped_with_its_settings(tmp_path: Path) -> None:
    opened = TokenFile.open(_token_file(tmp_path / "train.safetensors", 50))
    assert isinstance(opened.tokens, np.memmap)
    assert opened[2:] == (4, 100, 0)
    assert opened.rows().shape == (12, 5)


def test_a_batch_larger_than_the_text_is_told(tmp_path: Path) -> None:
    opened = TokenFile.open(_token_file(tmp_path / "train.safetensors", 50))
    assert len(opened.full_rows(12, "train.batch_size")) == 12
    with pytest.raises(SourceError) as caught:
        opened.full_rows(13, "train.batch_size")
    assert str(caught.value) == (
        "train.batch_size = 13: the training text fills 12 rows of 4 tokens. "
        "Lower train.batch_size or add text to pretokenize.sources."
    )


def test_another_safetensors_file_is_no_token_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact.write_arrays(path, {"tokens": np.arange(5)}, {})
    with pytest.raises(ArtifactError) as caught:
        TokenFile.open(path)
    assert str(caught.value) == (f"{path}: no token file (its metadata lacks 'context_length'). Run: doit pretokenize")
