from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlxflow.data import document_selection
from mlxflow.data.document_selection import (
    DUPLICATE,
    TEST,
    TRAIN,
    VALIDATION,
    DocumentSelection,
    held_out_share,
    select,
    tail_begin,
)
from mlxflow.data.shard import Shard
from mlxflow.data.shard_cache import ShardStore
from tests.data.test_shard_cache import KEYS, write


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "shards")


def _select(
    opened: Sequence[Shard],
    *,
    fixed: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    holdout: float = 0.1,
    deduplicate: bool = True,
    is_configured: Sequence[bool] | None = None,
) -> DocumentSelection:
    return select(
        opened,
        fixed_sides=fixed or [""] * len(opened),
        sources=list(range(len(opened))) if fixed is None else [0] * len(opened),
        weights=weights or [1.0] * len(opened),
        holdout=holdout,
        deduplicate=deduplicate,
        is_configured=is_configured or [False] * len(opened),
    )


def _texts(texts: list[str], sides: np.ndarray, side: int) -> set[str]:
    return {text for text, one in zip(texts, sides.tolist(), strict=True) if one == side}


def test_a_document_keeps_its_split_when_the_corpus_grows(store: ShardStore) -> None:
    few, many = [f"document {i}" for i in range(500)], [f"document {i}" for i in reversed(range(2000))]
    small = _select([write(store, KEYS[0], few)]).sides[0]
    large = _select([write(store, KEYS[1], many)]).sides[0]
    assert _texts(few, small, TRAIN) < _texts(many, large, TRAIN)
    assert _texts(few, small, VALIDATION) < _texts(many, large, VALIDATION)
    assert 30 < (small == VALIDATION).sum() < 70


@pytest.mark.parametrize("per_part", [1 << 21, 3])
def test_of_equal_documents_the_first_stays(store: ShardStore, monkeypatch: pytest.MonkeyPatch, per_part: int) -> None:
    monkeypatch.setattr(document_selection, "_DOCUMENTS_PER_PART", per_part)  # many small parts give the same
    opened = [write(store, KEYS[0], ["a", "b", "a"]), write(store, KEYS[1], ["c", "b", "d", "a"])]
    chosen = _select(opened, holdout=1e-9)
    kept = [(i, j) for i, side in enumerate(chosen.sides) for j, one in enumerate(side.tolist()) if one != DUPLICATE]
    assert kept == [(0, 0), (0, 1), (1, 0), (1, 2)]
    everything = _select(opened, holdout=1e-9, deduplicate=False)
    assert not any((side == DUPLICATE).any() for side in everything.sides)


def test_duplicates_are_in_the_same_split(store: ShardStore) -> None:
    texts = [f"document {i % 40}" for i in range(400)]
    for deduplicate in (True, False):
        sides = _select([write(store, KEYS[0], texts)], holdout=0.3, deduplicate=deduplicate).sides[0]
        assert not _texts(texts, sides, TRAIN) & _texts(texts, sides, VALIDATION)


def test_the_split_of_a_source_is_kept_and_a_copy_in_training_is_removed(store: ShardStore) -> None:
    opened = [write(store, KEYS[0], ["a", "b", "c"]), write(store, KEYS[1], ["b", "x"]), write(store, KEYS[2], ["c"])]
    chosen = _select(opened, fixed=["train", "validation", "test"], holdout=0.5)
    assert [side.tolist() for side in chosen.sides] == [[TRAIN, DUPLICATE, DUPLICATE], [VALIDATION] * 2, [TEST]]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_no_validation_document_is_trained_on(store: ShardStore, deduplicate: bool) -> None:
    opened = [write(store, KEYS[0], ["a", "a", "b", "c"]), write(store, KEYS[1], ["b", "x", "x"])]
    chosen = _select(opened, fixed=["train", "validation"], holdout=0.0, deduplicate=deduplicate)
    copy = DUPLICATE if deduplicate else TRAIN
    twice = DUPLICATE if deduplicate else VALIDATION
    assert [side.tolist() for side in chosen.sides] == [[TRAIN, copy, DUPLICATE, TRAIN], [VALIDATION] * 2 + [twice]]


def test_configured_validation_sources_have_priority_over_a_test_split(store: ShardStore) -> None:
    opened = [write(store, KEYS[0], ["a", "b"]), write(store, KEYS[1], ["a"]), write(store, KEYS[2], ["b"])]
    chosen = _select(
        opened, fixed=["test", "validation", "validation"], holdout=0.0, is_configured=[False, True, False]
    )
    assert [side.tolist() for side in chosen.sides] == [[DUPLICATE, TEST], [VALIDATION], [DUPLICATE]]


def test_in_a_small_corpus_one_whole_document_is_held_out(store: ShardStore) -> None:
    sides = _select([write(store, KEYS[0], ["one", "two", "three"])], holdout=1e-9).sides[0]
    assert sorted(sides.tolist()) == [TRAIN, TRAIN, VALIDATION]
    again = _select([write(store, KEYS[1], ["three", "one", "two"])], holdout=1e-9).sides[0]
    assert _texts(["one", "two", "three"], sides, VALIDATION) == _texts(["three", "one", "two"], again, VALIDATION)


def test_some_documents_always_stay_for_training(store: ShardStore) -> None:
    sides = _select([write(store, KEYS[0], ["one", "two", "three"])], holdout=0.999999).sides[0]
    assert sorted(sides.tolist()) == [TRAIN, TRAIN, VALIDATION]


def test_the_end_of_the_only_document_and_of_its_copies_is_held_out(store: ShardStore) -> None:
    alone = _select([write(store, KEYS[0], ["one"])], holdout=0.25)
    assert held_out_share(alone, 0.25) == 0.25
    equal = _select([write(store, KEYS[1], ["one", "one"])], holdout=0.25, deduplicate=False)
    assert held_out_share(equal, 0.25) == 0.25
    different = _select([write(store, KEYS[2], ["one", "two"])], holdout=0.25)
    assert held_out_share(different, 0.25) == 0


@pytest.mark.parametrize("share", [1e-9, 0.02, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 40])
def test_no_token_is_both_trained_on_and_held_out(length: int, share: float) -> None:
    for targets in (None, np.ones(length, np.bool_), np.arange(length) % 3 == 2, np.zeros(length, np.bool_)):
        begin = tail_begin(length, targets, share)
        learnt = np.arange(length)[1:] if targets is None else 1 + np.flatnonzero(targets[1:])
        trained, measured = learnt[learnt < begin], learnt[learnt > begin]
        if begin == length:
            assert not any((learnt[1:] - learnt[:1]) > 1)
            continue
        assert len(trained) > 0
        assert len(measured) > 0
        wanted = max(1, round(share * len(learnt)))
        assert len(measured) == min(wanted, int((learnt > learnt[0] + 1).sum()))


def test_sources_without_validation_data_are_split_by_hash(store: ShardStore) -> None:
    opened = [write(store, KEYS[0], [f"document {i}" for i in range(200)]), write(store, KEYS[1], [])]
    chosen = _select(opened, fixed=["train", "validation"], holdout=0.1)
    assert (chosen.sides[0] == VALIDATION).any()
    more = [opened[0], write(store, KEYS[2], ["to measure with"])]
    assert (_select(more, fixed=["train", "validation"], holdout=0.1).sides[0] == TRAIN).all()


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 1.7, 2.0, 3.5])
def test_source_weights_are_met_exactly(store: ShardStore, weight: float) -> None:
    first, second = [f"a {i}" for i in range(101)], [f"b {i}" for i in range(50)]
    opened = [write(store, KEYS[0], first), write(store, KEYS[1], second)]
    chosen = _select(opened, weights=[weight, 1.0], holdout=0.1)
    trained = chosen.sides[0] == TRAIN
    assert chosen.repeats[0][trained].sum() == round(int(trained.sum()) * weight)
    assert set(chosen.repeats[0][trained].tolist()) <= {int(weight), int(weight) + 1}
    assert (chosen.repeats[0][~trained] == 1).all()
    assert (chosen.repeats[1] == 1).all()


def test_an_empty_shard_is_accepted(store: ShardStore) -> None:
    chosen = _select([write(store, KEYS[0], []), write(store, KEYS[1], ["a", "b"])], weights=[2.0, 1.0])
    assert [len(side) for side in chosen.sides] == [0, 2]
