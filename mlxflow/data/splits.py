"""Determine by name whether a file, or a split of a data set, is for training, validation or test (its "side").

For record files (`.jsonl`, `.parquet` and so on), every word of their names and their folders count:
`test-00000-of-00001.parquet`, `squad_dev.jsonl`, `data/validation/part.json`. The name of a text file counts only if
another file is its training part (`wiki.train.txt` beside `wiki.test.txt`), because a text named `test.txt` or
`validation.py` may be about anything.

Imported by every `doit`, so it imports nothing heavy.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

#: The suffixes of record files, without a suffix of compression.
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")

_TEXT_SUFFIXES = ("", ".txt", ".text", ".tokens", ".raw")
_COMPRESSIONS = (".gz", ".zst")

# A word that may be attached, as in `testset`
_TOGETHER = r"(?:s|set|sets|split|data)?"
_SIDES = {
    "test": re.compile(rf"(?:test|testing){_TOGETHER}"),
    "validation": re.compile(rf"(?:validation|valid|val|dev|eval|evaluation|heldout|holdout){_TOGETHER}"),
    "train": re.compile(rf"(?:train|training){_TOGETHER}"),
}


# Common parts of the words above: most names contain none of them and need no further check
_HINT = re.compile(r"test|val|dev|held|hold|train", re.IGNORECASE)


def side_of(name: str) -> str:
    """Return the side in a name, "train", "validation" or "test"; "" for none.

    A name with words of several sides is test, else validation, so that evaluation data is never trained on.

    Args:
        name: of a split, or of a file without its suffixes; in any case and spelling.
    """
    words = _words(name)
    return next((side for side, word in _SIDES.items() if any(word.fullmatch(one) for one in words)), "")


def side_of_folder(name: str) -> str:
    """Return the side if it is the whole name of a folder: `test` and `held-out`, not `test-drives`."""
    return side_of(name) if all(side_of(word) for word in _words(name)) else ""


def is_records(name: str) -> bool:
    """Return whether a file contains records, by its name."""
    return _split_suffix(name)[1] in RECORD_SUFFIXES


def sides_of(paths: Sequence[PurePath]) -> list[str]:
    """Return the side of each file of a source; "" if its name has none.

    Args:
        paths: relative to the folder that the source names.
    """
    named = [_side_and_rest(path) for path in paths]
    trained = {rest for side, rest in named if side == "train"}
    return [
        side if is_records(path.name) or rest in trained else ""
        for path, (side, rest) in zip(paths, named, strict=True)
    ]


def is_divided(names: Iterable[str]) -> bool:
    """Return whether files are a data set with its own splits: records for training and others for evaluation.

    Args:
        names: relative to the folder that the source names.
    """
    sides: set[str] = set()
    for name in names:
        if _HINT.search(name) and is_records(name):
            sides.add(_side_and_rest(PurePath(name))[0])
            if "train" in sides and sides & {"validation", "test"}:
                return True
    return False


def _side_and_rest(path: PurePath) -> tuple[str, str]:
    """Return the side in the name of a file or in its nearest folder, and the path without it."""
    stem, suffix = _split_suffix(path.name)
    if suffix not in RECORD_SUFFIXES + _TEXT_SUFFIXES or not _HINT.search(str(path)):
        return "", ""
    if side := side_of(stem):
        rest = [word for word in _words(stem) if not side_of(word)]
        return side, "/".join([*path.parts[:-1], " ".join(rest)])
    for depth in range(len(path.parts) - 2, -1, -1):
        if side := side_of_folder(path.parts[depth]):
            return side, "/".join([*path.parts[:depth], ""])
    return "", ""


def _words(name: str) -> list[str]:
    """Return the words of a name in small letters, without numbers."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    return re.sub(r"\b(held|hold) out\b", "heldout", " ".join(re.split(r"[^a-z]+", apart))).split()


def _split_suffix(name: str) -> tuple[str, str]:
    """Return a file's name without its last suffix that is no compression, and that suffix in small letters."""
    path = PurePath(name)
    if path.suffix.lower() in _COMPRESSIONS:
        path = path.with_suffix("")
    return path.stem, path.suffix.lower()
