from typing import Any

import mlx.core as mx
import pytest

from mlxflow.training.restoring import arrays_problem, facts_problem, sizes_problem

FACTS = {"step": 3, "loss": 0.5, "ended": False}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"loss": 2}, ""),
        ({"step": True}, "step is no number"),
        ({"step": -1}, "step is out of range"),
        ({"step": 2**63}, "step is out of range"),
        ({"ended": 0}, "ended is neither true nor false"),
        ({"more": 1}, "other facts than this version keeps"),
    ],
)
def test_different_facts_are_named_by_the_first_difference(change: dict[str, Any], problem: str) -> None:
    assert facts_problem(FACTS | change, FACTS) == problem


def test_sizes_without_a_size_or_decisions_are_refused() -> None:
    assert sizes_problem({"size": 4, "too_large": None, "decisions": []}) == "its batch sizes are missing"
    assert sizes_problem({"size": 4, "decisions": []}).startswith("its batch sizes: Object missing required field")
    assert sizes_problem([]).startswith("its batch sizes: Expected `object`")


def test_different_arrays_are_found_by_name_shape_and_dtype() -> None:
    expected = {"update": {"a": mx.zeros((2,))}, "partial": [mx.zeros((1,))]}
    stored = {"update.a": mx.ones((2,)), "partial.0": mx.ones((1,), mx.bfloat16)}
    assert arrays_problem(stored, expected) == ""
    assert arrays_problem({"update.a": stored["update.a"]}, expected) == "partial.0 is missing"
    assert arrays_problem(stored | {"x": mx.zeros(1)}, expected) == "x is not of this run"
    wrong = arrays_problem(stored | {"update.a": mx.ones((3,))}, expected)
    assert wrong == "update.a is mlx.core.float32 [3], not mlx.core.float32 [2]"
    assert arrays_problem(stored | {"update.a": mx.ones((2,), mx.bfloat16)}, expected).startswith("update.a is")
