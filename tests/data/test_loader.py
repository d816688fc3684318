import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.data.loader import DeviceBatch, Loader, Order
from mlxflow.data.token_file import Batch, Rows, TokenFile
from mlxflow.messages.errors import ArtifactError, SourceError
from mlxflow.storage import tensor_writing


def _rows(count: int, length: int = 3) -> Rows:
    """Return rows that begin with their own number; all tokens but the first are trained on."""
    tokens = np.arange(count, dtype=np.uint16)[:, None] + np.zeros(length, np.uint16)
    return Rows(tokens, np.full((count, length), 3, np.uint8))


def _loader(rows: Rows, *, batch_size: int = 4, seed: int = 0, cursor: int = 0, own: list[int] | None = None) -> Loader:
    return Loader(
        rows,
        batch_size=batch_size,
        seed=seed,
        workers=8,
        prefetch_batches=4,
        cursor=cursor,
        own=None if own is None else np.array(own, np.int64),
    )


def _numbers(batches: Iterator[DeviceBatch]) -> list[int]:
    return [int(number) for batch in batches for number in np.array(batch.tokens)[:, 0]]


def test_further_arrays_of_the_rows_come_with_them() -> None:
    rows = _rows(12)
    length = rows.tokens.shape[1] - 1
    by_position = np.repeat(np.arange(12), length).reshape(12, length)
    rows = rows._replace(extras=(by_position * 10, np.stack([by_position, by_position * 2], axis=2)))
    with _loader(rows) as loader:
        batches = list(islice(loader, 3))
    for batch in batches:
        numbers = np.array(batch.tokens)[:, 0].astype(int)
        assert np.array_equal(np.array(batch.extras[0])[:, 0], numbers * 10)
        part = batch.part(1, 3)
        assert np.array_equal(np.array(part[3])[:, 0, 1], numbers[1:3] * 2)
        assert len(part) == 4
    assert np.array_equal(rows.head(2).extras[0][:, 0], [0, 10])


@pytest.mark.parametrize("count", [5, 12, 5000])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(count: int) -> None:
    order = Order(count, seed=7)
    first, second = order.rows(0, count).tolist(), order.rows(count, count).tolist()
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert order.rows(count // 2, count).tolist() == (first + second)[count // 2 : count // 2 + count]


def test_batches_come_in_the_order_of_the_permutation() -> None:
    expected = Order(50, seed=3).rows(0, 400).tolist()
    with _loader(_rows(50), seed=3) as loader:
        assert _numbers(islice(loader, 100)) == expected


def test_a_cursor_resumes_at_any_step() -> None:
    with _loader(_rows(10)) as loader:
        whole = _numbers(islice(loader, 12))
    for steps in (0, 1, 5, 11):
        with _loader(_rows(10)) as loader:
            begun = _numbers(islice(loader, steps))
            assert loader.cursor == 4 * steps
        with _loader(_rows(10), cursor=4 * steps) as resumed:
            assert begun + _numbers(islice(resumed, 12 - steps)) == whole


def test_ranks_read_their_own_rows_of_the_batches_of_one_process() -> None:
    with _loader(_rows(24), batch_size=6) as loader:
        whole = [_numbers(iter([batch])) for batch in islice(loader, 4)]
    owned = [[0, 1, 4, 5], [2, 3], []]
    for own in owned:
        with _loader(_rows(24), batch_size=6, own=own) as loader:
            batches = list(islice(loader, 4))
            assert [_numbers(iter([batch])) for batch in batches] == [[rows[place] for place in own] for rows in whole]
            assert {batch.targets for batch in batches} == {2 * len(own)}
            assert loader.cursor == 24


def test_the_next_batch_is_prefetched_to_the_device() -> None:
    with _loader(_rows(50)) as loader:
        next(loader)
        for _ in range(20):  # the workers may need a moment the first time
            if loader._next is not None:
                break
            next(loader)
        assert isinstance(loader._next, DeviceBatch)
        waiting = loader._next
        assert next(loader) is waiting
        assert isinstance(waiting.tokens, mx.array)
        assert waiting.targets == 4 * 2


def test_prefetching_stays_within_the_requested_number_of_batches() -> None:
    gathered: list[int] = []

    class Counting(Rows):
        def take(self, indices: np.ndarray) -> Batch:
            gathered.append(len(indices))
            return Rows.take(self, indices)

    with _loader(Counting(*_rows(50))) as loader:
        for _ in range(10):
            next(loader)
            assert len(gathered) <= loader._taken + 4
    assert len(gathered) <= 10 + 1 + 4


def test_a_worker_failure_names_its_rows_and_leaves_no_thread_running() -> None:
    class Failing(Rows):
        def take(self, indices: np.ndarray) -> Batch:
            if 7 in indices:
                raise OSError(5, "Input/output error")
            return Rows.take(self, indices)

    before = threading.active_count()
    with pytest.raises(OSError, match="Input/output error") as caught, _loader(Failing(*_rows(16))) as loader:
        list(islice(loader, 4))
    assert re.fullmatch(r"while rows \[.*\b7\b.*\] were gathered", caught.value.__notes__[0])
    assert threading.active_count() == before


def test_no_thread_is_left_running_when_the_caller_fails() -> None:
    def fail() -> None:
        with _loader(_rows(50)) as loader:
            next(loader)
            raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert threading.active_count() == before


def test_the_wait_time_counts_only_waiting_for_rows() -> None:
    release = threading.Event()

    class Slow(Rows):
        def take(self, indices: np.ndarray) -> Batch:
            release.wait()
            return Rows.take(self, indices)

    with _loader(Slow(*_rows(50))) as loader:
        threading.Timer(0.05, release.set).start()
        next(loader)
        waited = loader.waited_seconds
        assert waited > 0.03
        release.wait()


def _token_file(path: Path, count: int) -> Path:
    metadata = {"context_length": "4", "vocab_size": "100", "end_of_text": "0", "end_tokens": "0", "targets": "8"}
    tokens = np.arange(count * 5, dtype=np.uint8).reshape(count, 5)
    arrays = {"tokens": tokens, "marks": np.full_like(tokens, 3)}
    tensor_writing.write_arrays(path, arrays, metadata | {"has_conversations": "false"})
    return path


def test_a_token_file_is_mapped_with_its_settings(tmp_path: Path) -> None:
    opened = TokenFile.open(_token_file(tmp_path / "train.safetensors", 12))
    assert isinstance(opened.rows.tokens, np.memmap)
    assert opened[2:] == (4, 100, 0, False, 8, (0,))
    assert opened.rows.num_rows == 12
    assert opened.rows.take(np.array([11, 0])).tokens.tolist() == [[55, 56, 57, 58, 59], [0, 1, 2, 3, 4]]


def test_a_batch_larger_than_the_data_is_an_error(tmp_path: Path) -> None:
    opened = TokenFile.open(_token_file(tmp_path / "train.safetensors", 12))
    assert opened.full_rows(12, "train.batch_size").num_rows == 12
    with pytest.raises(SourceError) as caught:
        opened.full_rows(13, "train.batch_size", sources="pretokenize.sources")
    assert str(caught.value) == (
        "train.batch_size = 13: the training text fills 12 rows of 4 tokens. "
        "Lower train.batch_size or add text to pretokenize.sources."
    )


def test_ids_outside_the_models_vocabulary_are_an_error(tmp_path: Path) -> None:
    opened = TokenFile.open(_token_file(tmp_path / "train.safetensors", 12))
    opened.require_vocabulary(100, "profile.input")
    with pytest.raises(ArtifactError) as caught:
        opened.require_vocabulary(64, "profile.input")
    assert str(caught.value) == (
        f"profile.input: the tokens of {tmp_path} have ids up to 99, the model knows 64. "
        "Name the pretokenize stage that the model was trained on."
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"targets": "x"}, "a number in its metadata is not valid"),
        ({"context_length": "9" * 5000}, "a number in its metadata is not valid"),
        ({"end_tokens": "100"}, "its metadata names invalid ids"),
        ({"end_of_text": "-1"}, "its metadata names invalid ids"),
        ({"vocab_size": "0"}, "its metadata names invalid ids"),
        ({}, "its tokens and marks differ in shape"),
    ],
)
def test_a_damaged_token_file_is_named(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    path = tmp_path / "train.safetensors"
    metadata = {"context_length": "4", "vocab_size": "100", "end_of_text": "0", "end_tokens": "0", "targets": "8"}
    tokens = np.zeros((6, 5), np.uint8)
    arrays = {"tokens": tokens, "marks": tokens if change else tokens.reshape(5, 6)}
    tensor_writing.write_arrays(path, arrays, metadata | {"has_conversations": "false"} | change)
    with pytest.raises(ArtifactError) as caught:
        TokenFile.open(path)
    assert str(caught.value) == f"{path}: damaged ({reason}). Run: mlxflow build pretokenize"


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_writing.write_arrays(path, {"tokens": np.arange(5)}, {})
    with pytest.raises(ArtifactError) as caught:
        TokenFile.open(path)
    assert str(caught.value) == (
        f"{path}: no token file (its metadata lacks 'context_length'). Run: mlxflow build pretokenize"
    )
