"""Several runs compared: changes of figures, and the settings that differ."""

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxflow.report.elements import Note, Table, Text
from mlxflow.report.load_run import Run
from mlxflow.report.sections.comparison import section
from tests.report.runs import edit, read


def _set_rate(root: Path, rate: float) -> None:
    path = root / "mlxflow.lock"
    lock = tomllib.loads(path.read_text())
    lock["train"]["config"] = {"learning_rate": rate, "model": {"layers": 2}, "betas": [0.9, 0.95]}
    path.write_text(tomli_w.dumps(lock))


@pytest.fixture
def three(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three runs with learning rates and perplexities of their own."""
    runs = []
    for letter, rate, perplexity in (("A", 0.01, 40.0), ("B", 0.02, 30.0), ("C", 0.01, 50.0)):
        folder = tmp_path_factory.mktemp("runs") / letter
        shutil.copytree(root, folder)
        _set_rate(folder, rate)

        def change(report: dict[str, object], perplexity: float = perplexity) -> None:
            report["last_validation_perplexity"] = perplexity

        edit(folder, "train", change)
        runs.append(read(folder, label=f"{letter}: run"))
    return runs


def _table(runs: list[Run], caption: str) -> Table:
    return next(one for one in section(runs).blocks if isinstance(one, Table) and one.caption == caption)


def test_figures_have_their_change_against_the_first_run(three: list[Run]) -> None:
    table = _table(three, "Figures, with the change against A")
    assert table.head == ("Figure", "A: run", "B: run", "C: run")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["train: held-out perplexity"] == ("40", "30 (-25.0 %)", "50 (+25.0 %)")
    assert rows["train: parameters"] == ("68,672", "68,672 (+0.0 %)", "68,672 (+0.0 %)")
    assert rows["quantize:q4: size"] == ("49.1 kB", "49.1 kB (+0.0 %)", "49.1 kB (+0.0 %)")


def test_the_settings_that_differ_are_listed_and_no_others(three: list[Run]) -> None:
    table = _table(three, "Settings that differ")
    assert list(table.rows) == [("train.learning_rate", "0.01", "0.02", "0.01")]
    assert Text("All settings of these runs are equal.") in section([three[0], three[2]]).blocks


def test_the_layers_that_trials_chose_differ_though_their_setting_is_the_same(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tight"
    shutil.copytree(root, folder)

    def choose_pairs(report: dict[str, Any]) -> None:
        report["settings"].update(checkpoint_every=1, checkpoint_segment=2)

    edit(folder, "train", choose_pairs)
    runs = [read(root, label="A: run"), read(folder, label="B: tight")]
    assert list(_table(runs, "Settings that differ").rows) == [
        ("train: recomputed layers", "no layer is recomputed", "every layer is recomputed, in pairs")
    ]
    assert _table(runs, "Each run").rows[-1][2].endswith("every layer is recomputed, in pairs")


def test_a_run_without_a_lock_is_named(three: list[Run]) -> None:
    unknown = three[1]._replace(lock={}, lock_problem="is missing")
    blocks = section([three[0], unknown, three[2]]).blocks
    assert Note("B: run: its settings are not known: mlxflow.lock is missing.") in blocks


def test_one_run_is_not_compared(three: list[Run]) -> None:
    assert section(three[:1]).blocks == []
