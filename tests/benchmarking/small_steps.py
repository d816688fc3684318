"""Recipes of a small job, its rows, and runners of both, for the tests of the benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.unpacked_rows import apart
from mlxflow.data.token_file import Rows
from mlxflow.training import build
from tests.benchmarking.test_recipe import SETTINGS
from tests.small_models import llama


def packed_rows() -> Rows:
    """Return rows of nine tokens: two documents each, and a place left empty."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50, (24, 9)).astype(np.uint16)
    tokens[:, 8] = 0
    return Rows(tokens, np.tile(np.array([2, 3, 3, 3, 3, 4, 5, 5, 0], np.uint8), (24, 1)))


def workflow_recipe(**settings: Any) -> Recipe:
    return Recipe.of(SETTINGS.replace(**settings), is_packed=True)


def subject_of(recipe: Recipe) -> build.Subject:
    model, _ = llama()
    build.prepare_model(model, recipe.settings, adapter_seed=0)
    return build.Subject(model, recipe.settings, 50, 8)


@contextmanager
def open_runner(recipe: Recipe, rows: Rows | None = None) -> Iterator[Runner]:
    given = rows or (packed_rows() if recipe.is_packed else apart(packed_rows(), count=48, seed=0))
    with Runner.running(subject_of(recipe), given, recipe=recipe, seed=0) as runner:
        yield runner
