"""Which documents there are, each once, and on which side of the holdout each one falls."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

from mlxflow.data.sources import builtin_files, read_documents
from mlxflow.errors import SourceError


class Split(NamedTuple):
    """The two sides of a corpus and how many documents were left out as duplicates."""

    train: list[str]
    validation: list[str]
    duplicates: int


def read_builtin(name: str) -> tuple[list[str], int]:
    """Return the documents of a built-in corpus and the number of files left out because they are not UTF-8."""
    documents: list[str] = []
    skipped = 0
    for path in builtin_files(name):
        try:
            documents += read_documents(path)
        except SourceError:
            skipped += 1
    return documents, skipped


def split_documents(documents: Iterable[str], *, holdout: float) -> Split:
    """Leave out duplicates and empty documents, and choose the validation documents by the hash of their content.

    A document's side depends on nothing but its text, so it never changes when the corpus grows. Where no document
    falls on the validation side, as in a corpus of one, the end of the longest document is held out instead.

    Args:
        documents: texts in a fixed order, which is kept.
        holdout: share of the documents wanted for validation, over 0 and under 1.
    """
    train: list[str] = []
    validation: list[str] = []
    seen: set[bytes] = set()
    duplicates = 0
    for text in documents:
        digest = xxhash.xxh3_128_digest(text.encode())
        if not text.strip():
            continue
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        (validation if int.from_bytes(digest[:8], "big") < holdout * 2**64 else train).append(text)
    if train and not validation:
        _hold_out_tail(train, validation, holdout)
    return Split(train, validation, duplicates)


def _hold_out_tail(train: list[str], validation: list[str], holdout: float) -> None:
    longest = max(range(len(train)), key=lambda index: len(train[index]))
    text = train[longest]
    cut = len(text) - max(1, round(len(text) * holdout))
    train[longest] = text[:cut]
    validation.append(text[cut:])


def read_files(paths: Iterable[Path]) -> list[str]:
    """Return the documents of files, in order.

    Raises:
        SourceError: one line for each file that cannot be read.
    """
    documents: list[str] = []
    lines: list[str] = []
    for path in paths:
        try:
            documents += read_documents(path)
        except SourceError as error:
            lines += error.problems
        except OSError as error:
            lines.append(f"{path}: cannot be read ({error.strerror}). Mend it or leave it out of pretokenize.sources.")
    if lines:
        raise SourceError(*lines)
    return documents
