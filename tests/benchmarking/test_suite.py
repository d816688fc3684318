from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.benchmarking import roofline
from mlxflow.benchmarking import suite as suites
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.step_runner import Parts
from mlxflow.benchmarking.suite import Suite, sizes_with_rows
from mlxflow.data.token_file import TokenFile
from mlxflow.training.settings import SettingNames
from tests.benchmarking.report_rows import failed_row, model_row, training_row
from tests.benchmarking.small_steps import packed_rows
from tests.benchmarking.test_recipe import SETTINGS
from tests.small_models import FREE, llama


def _suite(*batch_sizes: int, own: int = 4) -> Suite:
    """Return the benchmark of a small model on rows of two documents each."""
    rows = packed_rows()
    targets = int((rows.marks[:, 1:] & 1).sum())
    return Suite(
        load=lambda: llama()[0],
        build=lambda: llama(seed=1)[0],
        tokens=TokenFile(Path("train.safetensors"), rows, 8, 50, 0, False, targets, ()),
        settings=SETTINGS.replace(batch_size=own),
        names=SettingNames(),
        batch_sizes=batch_sizes,
        num_steps=2,
        memory_limit_bytes=1 << 40,
        seed=0,
        budget=FREE,
    )


@pytest.mark.parametrize(("own", "nearest"), [(1, 2), (4, 4), (5, 4), (100, 16)])
def test_ablations_have_the_batch_size_nearest_to_the_workflows(own: int, nearest: int) -> None:
    suite = _suite(2, 4, 16, own=own)
    assert suite.own_batch_size == nearest
    recipes = list(suite.recipes())
    assert {one.batch_size for one in recipes if one.name.startswith("without")} == {nearest}
    assert [one.batch_size for one in recipes if one.name == "workflow"] == [2, 4, 16]


def test_a_batch_size_given_twice_has_its_ablations_once() -> None:
    names = [recipe.name for recipe in _suite(4, 4).recipes()]
    assert names.count("workflow") == 2
    assert names.count("without compile") == 1


def test_rows_of_one_document_are_used_only_without_packing() -> None:
    suite = _suite(4)
    workflow = suite.workflow(4)
    assert suite.is_packed
    assert suite.rows(workflow) is suite.tokens.rows
    assert suite.targets_per_row(workflow) == 6  # of eight tokens the first of each document is no target
    assert suite.tokens_per_row(workflow) == 8
    alone = suite.rows(workflow.baseline())
    assert alone.num_rows == 2 * suite.tokens.rows.num_rows
    assert suite.targets_per_row(workflow.baseline()) == 3
    assert suite.tokens_per_row(workflow.baseline()) == 4


def test_only_the_named_rows_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(recipes: Any, open_runner: Any, **settings: Any) -> tuple[list[Any], None]:
        measured.extend(f"{one.name}, {one.batch_size}" for one in recipes)
        return [], None

    monkeypatch.setattr(suites, "measure_recipes", measure)
    assert _suite(2, 4).measure(only={"workflow, 2 rows", "without compile, 4 rows", "train"}) == ((), None)
    assert measured == ["workflow, 2", "without compile, 4"]


def test_convergence_trains_the_untrained_model_by_the_baseline_and_the_workflow() -> None:
    curves = _suite(4).converge(3)
    assert [(curve.name, curve.steps) for curve in curves] == [("baseline", (1, 2, 3)), ("workflow", (1, 2, 3))]
    assert curves[1].tokens == (24, 48, 72), "six targets in each of four rows"


def test_the_parts_of_a_step_are_medians_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([Parts(1, 2, 3, 4), Parts(3, 2, 1, 0), Parts(2, 2, 2, 2)])

    class Runner:
        def run(self, num_steps: int) -> None: ...

        def time_parts(self) -> Parts:
            return next(steps)

    class Opened:
        def __enter__(self) -> Runner:
            return Runner()

        def __exit__(self, *error: object) -> None: ...

    def opened(suite: Suite, recipe: Recipe) -> Opened:
        assert (recipe.name, recipe.batch_size) == ("workflow", 4)
        return Opened()

    monkeypatch.setattr(Suite, "open", opened)
    parts = _suite(4).time_parts()
    assert parts == Parts(2, 2, 2, 2)
    assert parts.shares() == Parts(0.25, 0.25, 0.25, 0.25)


def test_rates_are_compared_with_the_ceilings_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "flops_ceiling", lambda dtype: 4e12 if dtype == mx.float32 else 0.0)
    monkeypatch.setattr(roofline, "bytes_ceiling", lambda dtype: 2e9)
    monkeypatch.setattr(roofline, "flops_per_token", lambda parameters, **shape: 100.0)
    suite = _suite(4)
    figures = suite.against_ceilings([training_row(100, batch_size=4)], model_row("train"))
    assert (figures.ceiling_flops_per_second, figures.ceiling_bytes_per_second) == (4e12, 2e9)
    assert figures.flops_per_second == 100 * 8 * 4  # four rows per second, with their padding
    stored = sum(array.nbytes for _, array in _arrays(suite))
    assert figures.decode_bytes_per_second == 10 * stored
    lacking = suite.against_ceilings([failed_row("workflow", batch_size=4), training_row(1, batch_size=2)], None)
    assert lacking.flops_per_second is None
    assert lacking.decode_bytes_per_second is None


def _arrays(suite: Suite) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    found: list[tuple[str, mx.array]] = tree_flatten(suite.load().parameters())
    return found


@pytest.mark.parametrize(
    ("sizes", "num_rows", "timed", "said"),
    [
        ((16, 32), 32, (16, 32), ""),
        ((16, 32), 20, (16,), "16 instead of 16, 32, the default: the training text fills 20 rows"),
        ((16, 32), 7, (6,), "6 instead of 16, 32, the default: the training text fills 7 rows"),
        ((16, 33), 40, (16, 33), ""),
        ((16, 33), 7, (16, 33), "33 rows repeat some: the training text fills 7 rows"),
    ],
)
def test_of_the_default_batch_sizes_those_with_enough_rows_are_timed(
    sizes: tuple[int, ...], num_rows: int, timed: tuple[int, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sizes_with_rows(sizes, (16, 32), own=6, num_rows=num_rows, task="benchmark") == timed
    assert capsys.readouterr().err == (f"benchmark.batch_sizes: {said}\n" if said else "")
