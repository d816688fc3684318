import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.evaluation.dense_reference import cached_reference
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.models import model_folder
from tests.evaluation.test_kl_divergence import _pair, _rows
from tests.small_models import llama


class _Counting:
    """Gives a model; counts the rows that went through its body."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        self.rows = 0

    def __call__(self) -> nn.Module:
        model = self._make()
        counting = self
        kind: Any = type(model.model)

        def call(self: Any, tokens: mx.array, *others: Any, **named: Any) -> Any:
            counting.rows += tokens.shape[0]
            return kind.__call__(self, tokens, *others, **named)

        model.model.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        return model


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])  # GPT-NeoX's blocks are called, not evaluated
def test_cached_hidden_states_equal_the_computed_ones(architecture: str, tmp_path: Path) -> None:
    dense, other = _pair(architecture)
    rows = _rows()
    wanted = measure_divergence(dense, other, rows, batch_size=4, masks_documents=False)
    load = _Counting(lambda: model_folder.build(config_of(architecture), seed=0))
    counts = []
    for _ in range(3):
        reference = cached_reference(
            load, rows, folder=tmp_path / "kept", key="one", batch_size=4, masks_documents=False
        )
        found = measure_divergence(reference, other, rows, batch_size=4, masks_documents=False)
        counts.append(load.rows)
        assert found == wanted
    assert counts[0] >= rows.num_rows
    assert counts[1:] == [counts[0]] * 2
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["one.safetensors"]


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path) -> None:
    rows = _rows(vocab_size=50)
    dense, other = llama()[0], llama(seed=1)[0]
    wanted = measure_divergence(dense, other, rows, batch_size=4, masks_documents=False)

    def measured() -> Any:
        reference = cached_reference(
            lambda: dense, rows, folder=tmp_path, key="one", batch_size=4, masks_documents=False
        )
        return measure_divergence(reference, other, rows, batch_size=4, masks_documents=False)

    assert measured() == wanted
    file = tmp_path / "one.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert measured() == wanted
    assert file.read_bytes() == whole


def test_the_least_recently_used_cache_file_is_removed_first(tmp_path: Path) -> None:
    rows, dense = _rows(vocab_size=50), llama()[0]
    for key in ("a", "b", "c", "d", "a", "e"):
        cached_reference(lambda: dense, rows, folder=tmp_path, key=key, batch_size=4, masks_documents=False)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["a", "c", "d", "e"]


class _LogitsOfAllPositions(nn.Module):  # type: ignore[misc]
    """A model whose logits of a position follow from all positions, so that no module of it is a body."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def layers(self) -> Any:
        return self.inner.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.inner(tokens, cache)
        return logits - logits.mean(axis=1, keepdims=True)


def test_a_model_without_a_recognized_body_is_not_cached(tmp_path: Path) -> None:
    dense, other = (_LogitsOfAllPositions(one) for one in _pair("llama"))
    rows = _rows()
    reference = cached_reference(lambda: dense, rows, folder=tmp_path, key="one", batch_size=4, masks_documents=False)
    wanted = measure_divergence(dense, other, rows, batch_size=4, masks_documents=False)
    assert measure_divergence(reference, other, rows, batch_size=4, masks_documents=False) == wanted
    assert not list(tmp_path.iterdir())


def test_only_the_weights_of_the_head_stay_in_memory_once_hidden_states_are_stored(tmp_path: Path) -> None:
    model, config = llama(hidden_size=256, num_layers=4, intermediate_size=1024, vocab_size=50)
    model_folder.save(
        model=model,
        config=config,
        model_file=tmp_path / "model.safetensors",
        config_file=tmp_path / "config.json",
        provenance={},
    )
    size = model_folder.num_bytes(model)
    del model
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    reference = cached_reference(
        lambda: model_folder.load(tmp_path, lazy=True)[0],
        _rows(vocab_size=50),
        folder=tmp_path / "kept",
        key="one",
        batch_size=4,
        masks_documents=False,
    )
    mx.eval(reference.body.logits(mx.zeros((1, 256))))
    assert mx.get_active_memory() - before < size // 10
