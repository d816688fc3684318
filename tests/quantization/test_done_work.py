from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.quantization import tuning_saves
from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.done_work import DoneWork, done_work
from mlxflow.quantization.hidden_streams import HiddenStreams
from mlxflow.quantization.learned_codes import OUTSIDE, BlockStore, LearnedCodes, learned_once
from mlxflow.quantization.tuning_saves import TuningSaves
from tests.quantization.test_work_counts import request_of

CODES = {"a": Packed(mx.zeros((2, 4), mx.uint32), mx.ones((2, 1)), mx.zeros((2, 1)))}


def _finish_blocks(folder: Path, count: int) -> None:
    streams = HiddenStreams(folder, key="k", num_rows=1, context_length=4, at_once=1)
    for number in range(count):
        streams.finish(number, CODES, [0.0])


def test_nothing_is_done_without_files(tmp_path: Path) -> None:
    for method in ("rtn", "gptq", "block"):
        assert done_work(request_of(method), tmp_path / "missing", num_blocks=4) == DoneWork()
        assert done_work(request_of(method), tmp_path, num_blocks=4) == DoneWork()


def test_finished_blocks_are_done(tmp_path: Path) -> None:
    _finish_blocks(tmp_path, 3)
    done = done_work(request_of("block", scale_steps=5), tmp_path, num_blocks=4)
    assert done == DoneWork(0.75, description="3 of 4 blocks are done")
    assert done_work(request_of("rtn"), tmp_path, num_blocks=4) == DoneWork()


def test_learned_codes_are_all_of_the_method(tmp_path: Path) -> None:
    learned_once(tmp_path, "1", lambda: LearnedCodes(CODES), task="quantize")
    done = done_work(request_of("block", scale_steps=5), tmp_path, num_blocks=4)
    assert done == DoneWork(1.0, 5, description="the layers are learned")


def test_steps_of_a_saved_tuning_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_saves, "_SECONDS", 0.0)
    TuningSaves(tmp_path, "1", task="quantize", total=8).note(2, lambda: {"a": mx.ones(1)})
    done = done_work(request_of("dwq"), tmp_path, num_blocks=4)
    assert done == DoneWork(0.25, description="2 of 8 steps are done")
    done = done_work(request_of("block", scale_steps=8), tmp_path, num_blocks=4)
    assert done == DoneWork(1.0, 2, description="2 of 8 scale_steps are done")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_kept_blocks_are_done(tmp_path: Path, method: str) -> None:
    store = BlockStore(tmp_path, "1")
    for name in ("model.layers.0", "model.layers.1", OUTSIDE):
        store.keep(name, {"a": mx.ones(1)})
    done = done_work(request_of(method), tmp_path, num_blocks=4)
    assert done == DoneWork(0.5, description="2 of 4 blocks are done")


def test_plans_of_a_budget_are_counted_with_their_finished_blocks(tmp_path: Path) -> None:
    _finish_blocks(tmp_path / "setting-0", 4)
    _finish_blocks(tmp_path / "setting-1", 1)
    budget = BudgetRequest(3.0, 0, (2, 4), (64,), setting="", key="")
    assert done_work(request_of("block", budget=budget), tmp_path, num_blocks=4) == DoneWork(trials=1.25)


def test_steps_up_to_the_last_checkpoint_are_done(tmp_path: Path) -> None:
    for name in ("step-000003", "step-000012", ".step-000020.partial"):
        (tmp_path / name).mkdir()
    training: Any = SimpleNamespace(settings=SimpleNamespace(num_steps=36))
    done = done_work(request_of("qat", training=training), tmp_path, num_blocks=4)
    assert done == DoneWork(training_steps=12, description="12 of 36 steps are done")
