"""The rows of token files, by property: every token of every document exactly once, in order."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxflow.data import row_packer
from mlxflow.data.corpus_figures import SideCounts
from mlxflow.data.document_selection import TRAIN, DocumentSelection
from mlxflow.data.row_packer import RowSettings
from mlxflow.data.shard import CONVERSATION, MASKED, Shard
from mlxflow.data.shard_cache import ShardStore
from mlxflow.data.token_file import TokenFile
from mlxflow.data.token_file_writer import SideDocuments, write_rows
from tests.data.test_shard_cache import KEYS

PADDING = 0


@pytest.fixture
def keeps_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the rows in which nothing is learnt too, so that every token can be looked for."""
    monkeypatch.setattr(row_packer, "has_targets", lambda marks: np.ones(len(marks), np.bool_))


METADATA = {"context_length": "0", "vocab_size": "60000", "end_of_text": "0", "end_tokens": "0"}


class Corpus:
    """Documents of random lengths, some of them conversations, in several shards; no two tokens are equal."""

    def __init__(self, folder: Path, seed: int, *, longest: int, conversations: float = 0.0) -> None:
        generator = random.Random(seed)
        self.shards: list[Shard] = []
        self.documents: list[list[int]] = []
        self.targets: list[list[bool]] = []
        self.is_conversation: list[bool] = []
        at = 1
        for key in KEYS[:3]:
            lengths = [generator.randint(1, longest) for _ in range(generator.randint(0, 12))]
            flags, counts, spans = [], [], []
            for length in lengths:
                self.documents.append(list(range(at, at + length)))
                at += length
                is_conversation = generator.random() < conversations
                trained = [True] * length
                flags.append((CONVERSATION | MASKED) * is_conversation)
                counts.append(0)
                if is_conversation:
                    begin = generator.randrange(length)
                    end = generator.randint(begin + 1, length)
                    trained = [begin <= i < end for i in range(length)]
                    spans.append((begin, end))
                    counts[-1] = 1
                self.targets.append(trained)
                self.is_conversation.append(is_conversation)
            flat = [token for document in self.documents[len(self.documents) - len(lengths) :] for token in document]
            with ShardStore(folder).write(key, np.dtype(np.uint16)) as writer:
                writer.append(
                    tokens=np.array(flat, np.uint16),
                    documents=np.array(
                        [(n, 0, 0, n, i + 1, flags[i], counts[i]) for i, n in enumerate(lengths)], np.uint64
                    ).reshape(-1, 7),
                    spans=np.array(spans, np.int64).reshape(-1, 2),
                )
            self.shards.append(ShardStore(folder).open(key))

    def write(self, path: Path, *, repeats: int = 1, **settings: Any) -> tuple[TokenFile, SideCounts]:
        sides = [np.full(shard.num_documents, TRAIN, np.uint8) for shard in self.shards]
        chosen = DocumentSelection(sides, [np.full(len(side), repeats, np.uint16) for side in sides])
        usual: dict[str, Any] = {
            "capacity": 9,
            "packing": "best-fit",
            "on_long": "split",
            "seed": 0,
            "padding": PADDING,
        }
        counts = write_rows(
            path,
            documents=SideDocuments(self.shards, chosen, TRAIN, "all", 0.0),
            rows=RowSettings(**(usual | settings)),
            dtype=np.dtype(np.uint16),
            metadata=METADATA,
            watch=lambda: None,
        )
        return TokenFile.open(path), counts


def _check(corpus: Corpus, opened: TokenFile, counts: SideCounts, *, repeats: int = 1) -> None:
    """Every token of every document as often as it should be, in order; every mark what it should be."""
    tokens, marks = np.array(opened.rows.tokens), np.array(opened.rows.marks)
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for row in range(len(tokens)):
        filled = 0
        for number, piece in enumerate(opened.pieces(row), 1):
            ids = tokens[row, piece.begin : piece.end].tolist()
            found.setdefault(piece.document, []).append((piece.document_begin, ids))
            trained = corpus.targets[piece.document][piece.document_begin : piece.document_begin + len(ids)]
            expected = [2 * number + (is_trained and i > 0) for i, is_trained in enumerate(trained)]
            assert marks[row, piece.begin : piece.end].tolist() == expected
            filled += len(ids)
        assert filled == (marks[row] > 0).sum()
        assert (tokens[row][marks[row] == 0] == PADDING).all()
    assert sorted(found) == list(range(len(corpus.documents)))
    for document, pieces in found.items():
        starts: dict[int, list[list[int]]] = {}
        for begin, ids in pieces:
            starts.setdefault(begin, []).append(ids)
        flat = sorted(token for _, ids in pieces for token in ids)
        assert flat == sorted(corpus.documents[document] * repeats)
        assert all(ids == corpus.documents[document][begin : begin + len(ids)] for begin, ids in pieces)
    assert counts.tokens == sum(map(len, corpus.documents)) * repeats == (marks > 0).sum()
    assert counts.targets == opened.targets == (marks & 1).sum()
    assert counts.slots == tokens.size
    assert counts.documents == len(corpus.documents)


@pytest.mark.usefixtures("keeps_every_row")
@pytest.mark.parametrize("packing", ["best-fit", "concat", "none"])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_written_exactly_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, seed: int
) -> None:
    monkeypatch.setattr(row_packer, "_WINDOW_TOKENS", 40)  # several windows
    monkeypatch.setattr(row_packer, "_WINDOW_ROWS", 1)
    corpus = Corpus(tmp_path, seed, longest=25, conversations=0.3)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", packing=packing)
    _check(corpus, opened, counts)


@pytest.mark.usefixtures("keeps_every_row")
@pytest.mark.parametrize("repeats", [2, 3])
def test_a_repeated_document_is_written_again(tmp_path: Path, repeats: int) -> None:
    corpus = Corpus(tmp_path, 3, longest=25)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", repeats=repeats)
    _check(corpus, opened, counts, repeats=repeats)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 5, longest=25)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corpus.write(tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.usefixtures("keeps_every_row")
def test_a_row_may_hold_more_than_255_documents(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 6, longest=1)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", capacity=700, repeats=60)
    assert opened.rows.marks.dtype == np.uint16
    assert len(opened.pieces(0)) > 300
    _check(corpus, opened, counts, repeats=60)


@pytest.mark.parametrize("packing", ["best-fit", "concat", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_without_targets_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, seed: int
) -> None:
    monkeypatch.setattr(row_packer, "_WINDOW_TOKENS", 40)  # several windows
    monkeypatch.setattr(row_packer, "_WINDOW_ROWS", 1)
    corpus = Corpus(tmp_path, seed, longest=25, conversations=0.7)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", packing=packing)
    monkeypatch.setattr(row_packer, "has_targets", lambda marks: np.ones(len(marks), np.bool_))
    every, _ = corpus.write(tmp_path / "every.safetensors", packing=packing)
    kept = [row for row in range(every.rows.num_rows) if (every.rows.marks[row] & 1).any()]
    assert counts.rows_without_targets == every.rows.num_rows - len(kept) > 0
    assert np.array_equal(opened.rows.tokens, every.rows.tokens[kept])
    assert np.array_equal(opened.rows.marks, every.rows.marks[kept])
    assert [opened.pieces(i) for i in range(len(kept))] == [every.pieces(row) for row in kept]
    assert counts.targets == opened.targets == every.targets
    assert counts.rows == len(kept)
