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


def read_builtins(names: Iterable[str]) -> tuple[list[str], int]:
    """Return the documents of built-in corpora and the number of files left out because they are not UTF-8."""
    documents: list[str] = []
    skipped = 0
    for path in (path for name in names for path in builtin_files(name)):
        try:
            documents += read_documents(path)
        except SourceError:
            skipped += 1
    return documents, skipped


def split_documents(documents: Iterable[str], *, holdout: float) -> Split:
    """Leave out duplicates and empty documents, and choose the validation documents by the hash of their content.

    A document's side depends on nothing but its text, so it does not change when the corpus grows. Only where no
    document falls on the validation side is the one with the smallest hash held out, or the end of the only one.

    Args:
        documents: texts in a fixed order, which is kept.
        holdout: share of the documents wanted for validation, over 0 and under 1.
    """
    unique: dict[bytes, str] = {}
    duplicates = 0
    for text in documents:
        if text.strip():
            digest = xxhash.xxh3_128_digest(text.encode())
            duplicates += digest in unique
            unique.setdefault(digest, text)
    held_out = {digest for digest in unique if int.from_bytes(digest[:8], "big") < holdout * 2**64}
    if not held_out and len(unique) > 1:
        held_out = {min(unique)}
    train = [text for digest, text in unique.items() if digest not in held_out]
    validation = [text for digest, text in unique.items() if digest in held_out]
    if len(unique) == 1:
        text = (train or validation)[0]
        cut = len(text) - max(1, round(len(text) * holdout))
        train, validation = [text[:cut]], [text[cut:]]
    return Split(train, validation, duplicates)


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
