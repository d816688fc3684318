"""What MLX merges and fuses in a graph."""

import pytest

from mlxflow.ops.graph_trace import Operation, Traced
from mlxflow.training.graph_fusion import compiled
from tests.training.test_graph_memory import _chain, _operation, _value


def test_ranges_and_what_is_made_of_them_are_not_merged() -> None:
    operations = [
        *(Operation("Arange", "", (), (_value(name),)) for name in "ab"),
        _operation("Cos", "a", "c"),
        _operation("Cos", "b", "d"),
        _operation("Matmul", "c d", "e"),
    ]
    graph = compiled(Traced(operations, [], [_value("e")]))
    assert [one.name for one in graph.operations] == ["Arange", "Cos", "Arange", "Cos", "Matmul"]


def test_what_is_broadcast_for_two_groups_is_fused_with_neither() -> None:
    operations = [
        _operation("Cos", "x", "c"),
        _operation("Broadcast", "c", "b"),
        _operation("Multiply", "b x", "first"),
        _operation("Matmul", "first", "n"),
        _operation("Multiply", "b n", "second"),
    ]
    graph = compiled(Traced(operations, [_value("x")], [_value("second")]))
    assert [one.name for one in graph.operations] == ["Cos", "Compiled", "Matmul", "Compiled"]


def test_equal_operations_are_merged_and_unneeded_ones_left_out() -> None:
    operations = [
        _operation("Matmul", "x", "a"),
        _operation("Matmul", "x", "b"),
        Operation("Matmul", "other", ("x",), (_value("c"),)),
        _operation("Copy", "b", "d"),
        _operation("Concatenate", "a c d", "e", 3),
        _operation("Matmul", "x e", "unneeded"),
    ]
    graph = compiled(Traced(operations, [_value("x")], [_value("e", 3)]))
    assert [one.name for one in graph.operations] == ["Matmul", "Matmul", "Concatenate"]
    assert graph.operations[-1].inputs == ("a", "c", "a")


def test_kernels_of_ones_own_are_never_merged() -> None:
    operations = [_operation("CustomKernel", "x", name) for name in "ab"] + [_operation("Concatenate", "a b", "c", 2)]
    graph = compiled(Traced(operations, [_value("x")], [_value("c", 2)]))
    assert graph.operations[-1].inputs == ("a", "b")


@pytest.mark.parametrize("is_used", [False, True])
def test_elementwise_operations_are_fused_unless_something_else_needs_them(is_used: bool) -> None:
    operations = [*_chain("Exp", 3), _operation("Matmul", "y0 y2" if is_used else "y2", "z")]
    graph = compiled(Traced(operations, [_value("x")], [_value("z")]))
    assert [one.name for one in graph.operations] == (["Exp"] if is_used else []) + ["Compiled", "Matmul"]
