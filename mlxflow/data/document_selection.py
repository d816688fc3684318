"""Deduplicate documents, split them into training, validation and test (the "sides"), and apply source weights.

Decisions follow from the hashes of the documents' contents, so a document never changes sides when the corpus grows.
Hashes are processed in parts, in bounded memory for any number of documents.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.data.shard import Shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The possible decisions about a document.
DUPLICATE, TRAIN, VALIDATION, TEST = 0, 1, 2, 3

#: The decision by the side in a source's name; "" lets the hash decide.
SIDES = {"": 0, "train": TRAIN, "validation": VALIDATION, "test": TEST}

_DOCUMENTS_PER_PART = 1 << 21


class DocumentSelection(NamedTuple):
    """The decisions about every document.

    Attributes:
        sides: for each shard (D,) DUPLICATE, TRAIN, VALIDATION or TEST.
        repeats: for each shard (D,) how often an epoch contains a training document; 1 on the other sides.
    """

    sides: "list[NDArray[np.uint8]]"
    repeats: "list[NDArray[np.uint16]]"


def is_held_out(digest: bytes, holdout: float) -> bool:
    """Return whether a document's hash assigns it to validation."""
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def held_out_share(selection: DocumentSelection, holdout: float) -> float:
    """Return the share of each training document to hold out because there is no whole document for validation.

    That is the case for a single document and for documents that are all equal.

    Args:
        selection: the decisions about every document.
        holdout: the share to hold out.
    """
    return 0.0 if any((side == VALIDATION).any() for side in selection.sides) else holdout


def tail_begin(length: int, targets: "NDArray[np.bool_] | None", share: float) -> int:
    """Return the position from which a document is held out; its length if nothing can be held out.

    At least one token is predicted in each part. The first token of each part is never predicted.

    Args:
        length: of the document, in tokens.
        targets: (length,) whether each token is trained on, or None for all of them.
        share: of the tokens that are trained on.
    """
    learnt = np.arange(1, length) if targets is None else 1 + np.flatnonzero(targets[1:])
    possible = learnt[learnt > learnt[0] + 1] if len(learnt) else learnt
    count = min(max(1, round(share * len(learnt))), len(possible))
    return int(possible[-count]) - 1 if count else length


def select(
    shards: Sequence[Shard],
    *,
    fixed_sides: Sequence[str],
    sources: Sequence[int],
    weights: Sequence[float],
    holdout: float,
    deduplicate: bool,
    is_configured: Sequence[bool],
) -> DocumentSelection:
    """Decide on the side and the repeats of every document.

    One of equal documents is kept: on the test side if possible, else on the validation side, else the first.

    Args:
        shards: in the order of the corpus.
        fixed_sides: for each shard the side in its source's name, or ""; "train" counts only if the same source has
            documents for validation.
        sources: for each shard the number of its source.
        weights: for each source how often an epoch contains its training documents; a fraction selects that share of
            them, those with the smallest hashes.
        holdout: share of the documents to hold out, of shards without a fixed side; if that is none or all of them,
            the one with the smallest hash; 0 for none.
        deduplicate: keep only one of equal documents; otherwise drop only training documents that are also on another
            side.
        is_configured: for each shard whether it is configured for validation, which has priority over a test side.
    """
    sides = _initial_sides(shards, _binding_sides(shards, fixed_sides, sources), holdout)
    ranks = [
        np.where(side == VALIDATION, TEST + 1, side) if one else side
        for side, one in zip(sides, is_configured, strict=True)
    ]
    _drop_duplicates(shards, sides, ranks, keeps_copies=not deduplicate)
    repeats = [np.ones(len(side), np.uint16) for side in sides]
    for source, weight in enumerate(weights):
        if weight != 1:
            _repeat([i for i, one in enumerate(sources) if one == source], shards, sides, repeats, weight)
    return DocumentSelection(sides, repeats)


def _binding_sides(shards: Sequence[Shard], fixed_sides: Sequence[str], sources: Sequence[int]) -> list[str]:
    """Return the sides of sources, without "train" if the same source has no document for validation."""
    measured = {
        source
        for shard, fixed, source in zip(shards, fixed_sides, sources, strict=True)
        if fixed == "validation" and shard.num_documents
    }
    return [
        "" if fixed == "train" and source not in measured else fixed
        for fixed, source in zip(fixed_sides, sources, strict=True)
    ]


def _initial_sides(shards: Sequence[Shard], fixed_sides: Sequence[str], holdout: float) -> "list[NDArray[np.uint8]]":
    """Return the side of each document before duplicates are dropped; both sides get a document if possible."""
    sides = [_sides(shard, SIDES[fixed], holdout) for shard, fixed in zip(shards, fixed_sides, strict=True)]
    if not holdout:
        return sides
    if not any((side == TRAIN).any() for side in sides):  # a few documents, all of them held out
        sides = [np.full_like(side, SIDES[fixed] or TRAIN) for side, fixed in zip(sides, fixed_sides, strict=True)]
    if not any((side == VALIDATION).any() for side in sides):
        _hold_out_one(shards, fixed_sides, sides)
    return sides


def _sides(shard: Shard, fixed: int, holdout: float) -> "NDArray[np.uint8]":
    if fixed or not shard.num_documents:
        return np.full(shard.num_documents, fixed or TRAIN, np.uint8)
    border = min(int(holdout * 2**64), 2**64 - 1)
    return np.where(shard.documents().hashes[:, 0] < np.uint64(border), VALIDATION, TRAIN).astype(np.uint8)


def _hold_out_one(shards: Sequence[Shard], fixed_sides: Sequence[str], sides: "list[NDArray[np.uint8]]") -> None:
    """Move the document with the smallest hash, and its duplicates, to the validation side if another one remains."""
    smallest: tuple[int, int] | None = None
    hashes = {
        i: shard.documents().hashes for i, shard in enumerate(shards) if not fixed_sides[i] and shard.num_documents
    }
    for digests in hashes.values():
        row = digests[np.lexsort((digests[:, 1], digests[:, 0]))[0]]
        smallest = min(smallest or (2**64, 0), (int(row[0]), int(row[1])))
    if smallest is None:
        return
    equal = {i: (digests == np.array(smallest, np.uint64)).all(axis=1) for i, digests in hashes.items()}
    total = sum(len(side) for side in sides)
    if sum(int(one.sum()) for one in equal.values()) < total:
        for i, mask in equal.items():
            sides[i][mask] = VALIDATION


def _drop_duplicates(
    shards: Sequence[Shard],
    sides: "list[NDArray[np.uint8]]",
    ranks: "list[NDArray[np.uint8]]",
    *,
    keeps_copies: bool,
) -> None:
    total = sum(len(side) for side in sides)
    num_parts = -(-total // _DOCUMENTS_PER_PART)
    for part in range(num_parts):
        hashes, members = [], []
        for number, shard in enumerate(shards):
            if not shard.num_documents:
                continue
            digests = shard.documents().hashes
            index = np.arange(len(digests))
            if num_parts > 1:
                index = np.flatnonzero(digests[:, 0] % np.uint64(num_parts) == part)
                digests = digests[index]
            hashes.append(digests)
            members.append((number, index))
        if not hashes:
            continue
        rank, side = (np.concatenate([of[number][index] for number, index in members]) for of in (ranks, sides))
        dropped = _find_dropped(np.concatenate(hashes), rank, side, keeps_copies=keeps_copies)
        if dropped.any():
            begin = 0
            for number, index in members:
                sides[number][index[dropped[begin : begin + len(index)]]] = DUPLICATE
                begin += len(index)


def _find_dropped(
    hashes: "NDArray[np.uint64]", ranks: "NDArray[np.uint8]", sides: "NDArray[np.uint8]", *, keeps_copies: bool
) -> "NDArray[np.bool_]":
    """Return (N,) whether each document is dropped: of equal ones, the first with the highest rank is kept.

    Args:
        hashes: (N, 2) in the order of the corpus.
        ranks: (N,) derived from the sides.
        sides: (N,)
        keeps_copies: drop only documents for training that equal one of another side.
    """
    dropped = np.zeros(len(hashes), np.bool_)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    equal = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    if not equal.any():
        return dropped
    order = np.lexsort((255 - ranks, hashes[:, 1], hashes[:, 0]))  # stable: equal ones keep the order of the corpus
    again = np.concatenate([[False], equal])  # documents that equal the one before them
    marked = again
    if keeps_copies:
        ordered = sides[order]
        best = ordered[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
        marked = again & (best != TRAIN) & (ordered == TRAIN)
    dropped[order[marked]] = True
    return dropped


def _repeat(
    members: list[int],
    shards: Sequence[Shard],
    sides: "list[NDArray[np.uint8]]",
    repeats: "list[NDArray[np.uint16]]",
    weight: float,
) -> None:
    """Set how often an epoch contains the training documents of one source."""
    whole = int(weight)
    trained = [np.flatnonzero(sides[i] == TRAIN) for i in members]
    total = sum(len(one) for one in trained)
    extra = round(total * weight) - total * whole
    for i, documents in zip(members, trained, strict=True):
        repeats[i][documents] = whole
    if extra > 0:
        hashes = np.concatenate([shards[i].documents().hashes[d, 0] for i, d in zip(members, trained, strict=True)])
        chosen = np.zeros(total, np.bool_)
        chosen[np.argsort(hashes, kind="stable")[:extra]] = True
        begin = 0
        for i, documents in zip(members, trained, strict=True):
            repeats[i][documents[chosen[begin : begin + len(documents)]]] += 1
            begin += len(documents)
