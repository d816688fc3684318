"""Compare the vocabularies of two tokenizers by their `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any, NamedTuple


def have_equal_ids(one: Path, other: Path) -> bool:
    """Return whether two tokenizers map the ids that both have to the same texts.

    The vocabularies must be equal; either may have added tokens that the other lacks.

    Args:
        one: a `tokenizer.json`.
        other: another one.

    Raises:
        ValueError: one of them is no valid `tokenizer.json`.
    """
    return added_tokens(one, beyond=other) is not None


def added_tokens(tokenizer_file: Path, *, beyond: Path) -> list[str] | None:
    """Return the tokens of a tokenizer that another one lacks, in the order of their ids; None if their ids differ.

    Args:
        tokenizer_file: a `tokenizer.json`.
        beyond: that of the other one; see `have_equal_ids`.

    Raises:
        ValueError: one of them is no valid `tokenizer.json`.
    """
    if tokenizer_file.read_bytes() == beyond.read_bytes():
        return []
    known, own = _read(beyond), _read(tokenizer_file)
    if known == own:  # most files that differ in bytes are the same in another layout
        return []
    if not _are_equal(known, own):
        return None
    return sorted(own.ids.keys() - known.ids.keys(), key=own.ids.__getitem__)


class _Ids(NamedTuple):
    """Ids by text: those of all tokens, and those of the added tokens."""

    ids: dict[str, int]
    added: dict[str, int]


def _are_equal(first: _Ids, second: _Ids) -> bool:
    apart = first.added.keys() | second.added.keys()
    core, other_core = ({t: n for t, n in read.ids.items() if t not in apart} for read in (first, second))
    if core != other_core:
        return False
    texts = {number: text for text, number in first.ids.items()}
    return all(first.ids.get(t, n) == n and texts.get(n, t) == t for t, n in second.ids.items())


def _read(path: Path) -> _Ids:
    try:
        definition: Any = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = definition["model"]["vocab"]
        added = {str(one["content"]): int(one["id"]) for one in definition.get("added_tokens") or []}
        if isinstance(vocabulary, list):  # pieces with scores
            vocabulary = {piece: number for number, (piece, *_) in enumerate(vocabulary)}
        return _Ids({text: int(number) for text, number in vocabulary.items()} | added, added)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: {error!r}") from error
