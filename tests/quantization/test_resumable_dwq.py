"""DWQ that continues from a saved state, compared to the bit with mlx-lm's own function."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.quant import dwq

from mlxflow.quantization import tuning_saves
from mlxflow.quantization.mlx_lm_patches import numpy_random_kept, quiet
from mlxflow.quantization.resumable_dwq import train
from mlxflow.quantization.tuning_saves import TuningSaves
from tests.small_models import llama

TOTAL = 5
ROWS = [(row, 0) for row in np.random.default_rng(5).integers(0, 60, (2 * TOTAL + 2, 9)).tolist()]


def _models() -> tuple[nn.Module, nn.Module]:
    """Return a quantized model, frozen, and the dense one."""
    dense, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=64)
    dense.eval()
    student = copy.deepcopy(dense)
    nn.quantize(student, group_size=32, bits=2)
    student.freeze()
    return student, dense


def _trained(saves: TuningSaves, logits: Any = None) -> dict[str, mx.array]:
    student, dense = _models()
    with numpy_random_kept():
        train(
            student,
            logits or dense,
            ROWS,
            batch_size=2,
            learning_rate=1e-3,
            seed=3,
            dtype=mx.float32,
            saves=saves,
        )
    return dict(tree_flatten(student.parameters()))


@pytest.fixture(scope="module")
def whole() -> dict[str, mx.array]:
    """What mlx-lm's function trains."""
    student, dense = _models()
    with numpy_random_kept(), quiet():
        dwq.dwq_quantize(
            student,
            lambda batch, _, split: dense(batch),
            optim.Adam(learning_rate=1e-3, bias_correction=True),
            ROWS[:-2],
            ROWS[-2:],
            batch_size=2,
            max_seq_length=9,
            seed=3,
            dtype=mx.float32,
        )
    return dict(tree_flatten(student.parameters()))


def _assert_equal(found: dict[str, mx.array], whole: dict[str, mx.array]) -> None:
    assert found.keys() == whole.keys()
    assert [name for name in whole if not mx.array_equal(found[name], whole[name])] == []


def _saves(folder: Path | None) -> TuningSaves:
    return TuningSaves(folder, "1", task="quantize", total=TOTAL)


def test_without_a_state_it_is_mlx_lms_function(whole: dict[str, mx.array]) -> None:
    _assert_equal(_trained(_saves(None)), whole)
    rounded = dict(tree_flatten(_models()[0].parameters()))
    assert any(not mx.array_equal(rounded[name], value) for name, value in whole.items())


@pytest.mark.parametrize("steps", [1, 3, TOTAL])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    whole: dict[str, mx.array], tmp_path: Path, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, dense = _models()
    calls: Iterator[int] = iter(range(100))

    def interrupting(batch: mx.array) -> mx.array:
        if next(calls) == steps + 1:  # the first call is of the validation before the first step
            raise KeyboardInterrupt
        logits: mx.array = dense(batch)
        return logits

    with pytest.raises(KeyboardInterrupt):
        _trained(_saves(tmp_path), interrupting)
    # mlx-lm's own lines are not printed
    assert capsys.readouterr() == (
        "",
        f"quantize: stopped after step {steps} of {TOTAL} of the tuning; the next run resumes from there\n",
    )
    second = _saves(tmp_path)
    assert second.first == steps
    _assert_equal(_trained(second), whole)


def test_steps_that_are_done_are_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SECONDS", "_DURATIONS"):
        monkeypatch.setattr(tuning_saves, name, 0.0)
    _trained(_saves(tmp_path))
    done = _saves(tmp_path)
    assert done.first == TOTAL

    def refusing(batch: mx.array) -> mx.array:
        raise AssertionError("a step is taken")

    _trained(done, refusing)
