from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.storage import state_files
from mlxflow.training.checkpoints import CheckpointStore
from tests.training.small_training import (
    checkpoint_store,
    make_trainer,
)

MADE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a step that is text": (lambda facts: facts.update(step="4"), "step is no number"),
    "a step below zero": (lambda facts: facts.update(step=-1), "step is out of range"),
    "no loss": (lambda facts: facts.update(best_loss=None), "best_loss is no number"),
    "an end that is a number": (lambda facts: facts.update(ended_early=1), "ended_early is neither true nor false"),
    "a fact too many": (lambda facts: facts.update(more=1), "other facts than this version keeps"),
    "sizes that are a list": (
        lambda facts: facts.update(sizes=[]),
        "its batch sizes: Expected `object`, got `array`",
    ),
    "an update that was not cut short": (
        lambda facts: facts.update(rows_done=1),
        "partial.0 is missing",
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_a_checkpoint_with_changed_facts_is_not_used(tmp_path: Path, case: str) -> None:
    trainer = make_trainer(lambda record: None, store=checkpoint_store(tmp_path), save_every=4)
    trainer.run()
    change, reason = MADE[case]
    folder = tmp_path / "own" / "step-000004"
    kept = state_files.read(folder / "state.json")
    change(kept["facts"])
    (folder / "state.json").write_bytes(state_files.encode(kept))
    said: list[str] = []
    store = CheckpointStore(tmp_path / "own", keep=2, settings={"train.num_steps": 6}, say=said.append)
    assert store.latest(trainer.unfit) is None
    assert said == [f"{folder}: not a whole checkpoint ({reason}); it is not used. Remove it."]
