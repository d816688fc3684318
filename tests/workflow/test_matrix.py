from typing import Any

import msgspec
import pytest

from mlxflow.storage.toml_tables import Problem
from mlxflow.workflow.matrix import expand_matrix


def _expand(table: dict[str, Any]) -> list[dict[str, Any]]:
    problems: list[Problem] = []
    tables = list(expand_matrix(table, problems))
    assert problems == []
    return tables


def test_a_table_without_a_matrix_is_unchanged() -> None:
    assert _expand({"bits": 4, "name": "q"}) == [{"bits": 4, "name": "q"}]


def test_a_matrix_makes_every_combination_in_order() -> None:
    tables = _expand({"mode": "affine", "matrix": {"bits": [4, 8], "group_size": [32, 64]}})
    assert tables == [
        {"mode": "affine", "bits": 4, "group_size": 32, "name": "bits4-group_size32"},
        {"mode": "affine", "bits": 4, "group_size": 64, "name": "bits4-group_size64"},
        {"mode": "affine", "bits": 8, "group_size": 32, "name": "bits8-group_size32"},
        {"mode": "affine", "bits": 8, "group_size": 64, "name": "bits8-group_size64"},
    ]


def test_exclusions_remove_matching_combinations() -> None:
    matrix = {"bits": [4, 8], "group_size": [32, 64]}
    names = [t["name"] for t in _expand({"matrix": matrix, "exclude": [{"bits": 8, "group_size": 32}, {"bits": 4}]})]
    assert names == ["bits8-group_size64"]


def test_dotted_keys_reach_into_nested_tables_and_names_are_readable() -> None:
    tables = _expand(
        {
            "name": "deep",
            "model": {"hidden_size": 64},
            "matrix": {"model.num_layers": [2, 4], "learning_rate": [1e-3], "mode": ["a b"], "model.tied": [True]},
        }
    )
    assert [t["name"] for t in tables] == [
        "deep-num_layers2-learning_rate0.001-mode-a_b-tied-true",
        "deep-num_layers4-learning_rate0.001-mode-a_b-tied-true",
    ]
    assert tables[1]["model"] == {"hidden_size": 64, "num_layers": 4, "tied": True}
    assert tables[0]["model"]["num_layers"] == 2


EXAMPLE = "Write one such as matrix = { bits = [4, 8] }."


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"matrix": 3}, Problem("matrix", 3, "expected a table of lists", EXAMPLE)),
        ({"matrix": {}}, Problem("matrix", {}, "expected a table of lists", EXAMPLE)),
        ({"matrix": {"bits": 4}}, Problem("matrix.bits", 4, "expected a list of values", EXAMPLE)),
        ({"matrix": {"bits": []}}, Problem("matrix.bits", [], "expected a list of values", EXAMPLE)),
        ({"matrix": {"name": ["a"]}}, Problem("matrix.name", ["a"], "cannot vary", "Choose a key of the stage.")),
        (
            {"bits": 4, "matrix": {"bits": [4]}},
            Problem("bits", 4, "is also in the matrix", "Remove one of the two."),
        ),
        (
            {"matrix": {"bits": [4]}, "exclude": {"bits": 4}},
            Problem("exclude", {"bits": 4}, "expected a list of tables", "Write one such as exclude = [{ bits = 8 }]."),
        ),
        (
            {"matrix": {"bits": [4]}, "exclude": [{"mode": 4}]},
            Problem("exclude.mode", msgspec.UNSET, "is no key of the matrix", "Known: bits."),
        ),
        (
            {"matrix": {"bits": [4]}, "exclude": [{"bits": 8}]},
            Problem("exclude", {"bits": 8}, "matches no combination of the matrix", "Remove it or fix it."),
        ),
        (
            {"exclude": [{"bits": 8}]},
            Problem("exclude", [{"bits": 8}], "there is no matrix to exclude from", "Remove the key."),
        ),
    ],
)
def test_an_invalid_matrix_is_an_error(table: dict[str, Any], problem: Problem) -> None:
    problems: list[Problem] = []
    list(expand_matrix(table, problems))
    assert problems == [problem]
