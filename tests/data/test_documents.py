from pathlib import Path

import pytest

from mlxflow.data.documents import read_files, split_documents
from mlxflow.errors import SourceError


def test_a_document_never_changes_sides_when_the_corpus_grows() -> None:
    few = split_documents([f"document {i}" for i in range(500)], holdout=0.1)
    many = split_documents([f"document {i}" for i in reversed(range(2000))], holdout=0.1)
    assert set(few.train) < set(many.train)
    assert set(few.validation) < set(many.validation)
    assert 30 < len(few.validation) < 70


def test_duplicates_and_empty_documents_are_left_out_and_counted() -> None:
    split = split_documents(["a", "b", " \n", "a", "", "a", "c"], holdout=0.4)
    assert sorted(split.train + split.validation) == ["a", "b", "c"]
    assert split.duplicates == 2


def test_the_order_of_documents_is_kept() -> None:
    texts = [f"document {i}" for i in range(100)]
    split = split_documents(texts, holdout=0.1)
    assert split.train == [text for text in texts if text in split.train]


def test_in_a_small_corpus_one_whole_document_is_held_out() -> None:
    split = split_documents(["one", "two", "three"], holdout=1e-9)
    assert len(split.validation) == 1
    assert sorted(split.train + split.validation) == ["one", "three", "two"]


@pytest.mark.parametrize("holdout", [0.1, 0.999999])
def test_of_the_only_document_the_end_is_held_out(holdout: float) -> None:
    text = "".join(map(str, range(1000)))
    split = split_documents([text], holdout=holdout)
    assert split.train[0] + split.validation[0] == text
    assert len(split.validation[0]) == round(len(text) * holdout)


def test_every_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(SourceError) as caught:
        read_files([tmp_path / "bad.txt", tmp_path / "good.txt", tmp_path / "gone.txt"])
    assert caught.value.problems == (
        f"{tmp_path / 'bad.txt'}: byte 0 is not UTF-8. Save the file as UTF-8 or leave it out of pretokenize.sources.",
        f"{tmp_path / 'gone.txt'}: cannot be read (No such file or directory). "
        "Mend it or leave it out of pretokenize.sources.",
    )
