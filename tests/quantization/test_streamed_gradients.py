import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.models import model_folder
from mlxflow.quantization import streamed_gradients
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.streamed_gradients import GradientRows, visit_gradients
from mlxflow.training.objective import make_objective

MARKS = [[2, 3, 3, 3, 5, 5, 5, 5, 5, 5], [3] * 10, [2, 2, 2, 3, 3, 3, 3, 3, 3, 3]]


def _visited(model: nn.Module, rows: GradientRows) -> tuple[float, list[dict[str, list[np.ndarray]]]]:
    """Return the number of targets, and the gradients of all rows by path for each part."""
    parts: list[dict[str, list[np.ndarray]]] = []

    @contextmanager
    def part(weights: Mapping[str, mx.array]) -> Iterator[Any]:
        found: dict[str, list[np.ndarray]] = {path: [] for path in weights}

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, gradient in gradients.items():
                found[path].append(np.array(gradient))

        yield add
        parts.append(found)

    count = visit_gradients(lambda: copy.deepcopy(model), list(quantizable_layers(model)), rows, part=part)
    return count, parts


@pytest.mark.parametrize(("masks", "fused"), [(False, False), (True, True)])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "cohere", "mixtral"])
def test_gradients_block_by_block_are_those_of_the_whole_model(
    architecture: str, masks: bool, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    tokens = mx.random.randint(0, VOCAB_SIZE, (3, 10), key=mx.random.key(1))
    objective = make_objective(model, fused=fused, vocab_size=VOCAB_SIZE, masks_documents=masks)
    rows = GradientRows(tokens, mx.array(MARKS, mx.uint8), objective, tmp_path / "inputs")
    count, parts = _visited(model, rows)
    assert len(parts) == len(model.layers) + sum(".layers." not in path for path in quantizable_layers(model))
    assert not (tmp_path / "inputs").exists()
    monkeypatch.setattr(streamed_gradients, "find_blocks", lambda *_, **__: "no list of blocks")
    same_count, (whole,) = _visited(model, rows)
    assert count == same_count == sum(mark & 1 for marks in MARKS for mark in marks[1:])
    found = {path: gradients for part in parts for path, gradients in part.items()}
    assert found.keys() == whole.keys()
    for path, gradients in whole.items():
        for one, other in zip(found[path], gradients, strict=True):
            assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max() + 1e-7, path
