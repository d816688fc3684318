from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.quantization import rounding_check
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.rounding_check import RoundingCheck, check_rounding
from mlxflow.quantization.settings import Setting
from tests.small_models import llama

_TOKENS = np.random.default_rng(0).integers(0, 60, (20, 17)).astype(np.uint16)
_ROWS = Rows(_TOKENS, np.full(_TOKENS.shape, 3, np.uint8))
_TWO = Setting("affine", 2, 64)


def _dense() -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    model.eval()
    return model


def _changed(change: Callable[[mx.array], mx.array]) -> Callable[[], nn.Module]:
    """Return a function that loads the dense model with changed layers."""

    def load() -> nn.Module:
        model = _dense()
        for layer in quantizable_layers(model).values():
            layer.weight = change(layer.weight)
        return model

    return load


def _check(learned: Callable[[], nn.Module], folder: Path, *, by_text: bool = False) -> RoundingCheck:
    plan = dict.fromkeys(quantizable_layers(_dense()), _TWO)
    return check_rounding(_dense, learned, plan, _ROWS, folder=folder, by_text=by_text)


def test_a_model_that_is_rounded_loses_what_rounding_loses(tmp_path: Path) -> None:
    found = _check(_changed(lambda weight: round_trip(weight, _TWO)), tmp_path)
    assert found.learned == pytest.approx(found.rounded, rel=1e-5)
    assert found.rounded > 0
    assert not found.is_worse


def test_a_worse_model_is_found_and_a_better_one_is_not(tmp_path: Path) -> None:
    better = _check(_changed(lambda weight: round_trip(weight, Setting("affine", 8, 64))), tmp_path)
    assert better.learned < better.rounded / 10
    assert not better.is_worse
    worse = _check(_changed(lambda weight: 4 * round_trip(weight, _TWO)), tmp_path)
    assert worse.learned > worse.rounded == better.rounded
    assert worse.is_worse


def test_a_method_that_learns_the_text_is_judged_by_its_loss(tmp_path: Path) -> None:
    """Another model diverges from the dense one, and predicts random text as well."""
    other = _changed(lambda weight: weight[::-1])
    assert _check(other, tmp_path).is_worse
    found = _check(other, tmp_path, by_text=True)
    assert abs(found.learned - found.rounded) < 0.3
    assert found.rounded > 3.5  # about the logarithm of 60 tokens


def test_only_some_rows_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_check, "CHECKED_ROWS", 2)
    few = _check(_dense, tmp_path / "few")
    monkeypatch.setattr(rounding_check, "CHECKED_ROWS", 20)
    assert few.rounded != _check(_dense, tmp_path / "all").rounded
