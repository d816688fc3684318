from pathlib import Path

import numpy as np
import pytest

from tests.data.test_token_file_writer import Corpus, _check, keeps_every_row  # noqa: F401


@pytest.mark.usefixtures("keeps_every_row")
@pytest.mark.parametrize("seed", range(8))
def test_best_fit_splits_no_document_that_fits_a_row(tmp_path: Path, seed: int) -> None:
    corpus = Corpus(tmp_path, seed, longest=25)
    opened, counts = corpus.write(tmp_path / "rows.safetensors")
    pieces = [piece for row in range(opened.rows.num_rows) for piece in opened.pieces(row)]
    for document, tokens in enumerate(corpus.documents):
        assert sum(piece.document == document for piece in pieces) == -(-len(tokens) // 9)
    assert counts.needlessly_cut == 0
    assert counts.cut_documents == sum(len(tokens) > 9 for tokens in corpus.documents)


def test_concat_fills_all_rows_but_the_last_and_counts_cuts(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 1, longest=25)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", packing="concat")
    marks = np.array(opened.rows.marks)
    assert (marks[:-1] > 0).all()
    assert counts.needlessly_cut > 0


@pytest.mark.usefixtures("keeps_every_row")
@pytest.mark.parametrize("packing", ["best-fit", "concat", "none"])
def test_a_conversation_that_fits_a_row_is_never_cut(tmp_path: Path, packing: str) -> None:
    corpus = Corpus(tmp_path, 2, longest=9, conversations=1.0)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", packing=packing)
    _check(corpus, opened, counts)
    assert counts.cut_documents == 0
    assert opened.has_conversations


@pytest.mark.usefixtures("keeps_every_row")
@pytest.mark.parametrize("on_long", ["split", "truncate", "drop"])
def test_long_conversations_follow_the_setting_and_are_counted(tmp_path: Path, on_long: str) -> None:
    corpus = Corpus(tmp_path, 4, longest=25, conversations=1.0)
    opened, counts = corpus.write(tmp_path / "rows.safetensors", on_long=on_long)
    found = {ids[0]: ids for ids in (one.tolist() for one in opened.documents())}
    long = [document for document in corpus.documents if len(document) > 9]
    assert long
    for document in corpus.documents:
        kept = {"split": document, "truncate": document[:9], "drop": document if len(document) <= 9 else None}[on_long]
        assert found.get(document[0]) == kept
    assert counts.truncated == (len(long) if on_long == "truncate" else 0)
    assert counts.dropped == (len(long) if on_long == "drop" else 0)
