"""The memory of a graph's arrays by MLX's rules, from shapes; every case is small enough to count by hand."""

import itertools
from collections.abc import Sequence

from mlxflow.ops.graph_trace import Operation, Value
from mlxflow.training.device_lag import Ahead
from mlxflow.training.graph_fusion import Graph
from mlxflow.training.graph_memory import peak_bytes

MB = 1 << 20


def _value(name: str, megabytes: int = 1) -> Value:
    return Value(name, (megabytes, MB // 4), 4)


def _operation(name: str, inputs: str, output: str, megabytes: int = 1) -> Operation:
    return Operation(name, "", tuple(inputs.split()), (_value(output, megabytes),))


def _chain(kind: str, length: int) -> list[Operation]:
    names = ["x", *(f"y{number}" for number in range(length))]
    return [_operation(kind, before, after) for before, after in itertools.pairwise(names)]


def _peak(operations: Sequence[Operation], *results: str, lag: int = 0, held: int = MB) -> float:
    return peak_bytes([Graph(operations, results)], held, {}, lag=Ahead(lag)) / MB


def test_a_product_needs_its_input_and_its_result() -> None:
    assert _peak(_chain("Matmul", 5), "y4") == 3  # the input of all, and of each product its input and result


def test_an_elementwise_operation_writes_into_an_input_that_nothing_else_needs() -> None:
    assert _peak(_chain("Exp", 5), "y4") == 2
    assert _peak([*_chain("Exp", 2), _operation("Matmul", "y0 y1", "z")], "z") == 4


def test_buffers_are_freed_when_the_device_is_done() -> None:
    assert _peak(_chain("Matmul", 9), "y8", lag=4) == 5
    assert _peak(_chain("Matmul", 9), "y8", lag=100) == 10


def test_views_share_the_buffer_and_keep_it() -> None:
    operations = [
        _operation("Matmul", "x", "a"),
        _operation("Transpose", "a", "b"),
        _operation("Matmul", "x", "c"),
        _operation("Matmul", "b c", "d"),
    ]
    assert _peak(operations, "d") == 4
    copied = [*operations[:2], _operation("Reshape", "b", "e"), _operation("Matmul", "e", "d")]
    assert _peak(copied, "d") == 3  # a transposed array is copied to be reshaped
    assert _peak([operations[0], _operation("Reshape", "a", "e")], "e") == 2


def test_a_host_that_is_ahead_waits_for_tasks_of_several_dispatches() -> None:
    graph = Graph(_chain("Matmul", 20), ["y19"])  # two dispatches each: of 28, 10 are done at the most
    assert peak_bytes([graph], MB, {}, lag=Ahead(10, 10)) / MB == 12


def test_a_view_under_way_does_not_keep_an_operation_from_writing_in_place() -> None:
    operations = [_operation("Matmul", "x", "a"), _operation("Transpose", "a", "b"), _operation("Exp", "b", "c")]
    assert _peak(operations, "c", lag=100) == 2


def test_inputs_that_are_replaced_are_freed_once_for_all_their_views() -> None:
    changed = {"w": ("weights", 4 * MB), "view of w": ("weights", 4 * MB)}
    operations = [_operation("Matmul", "view of w", "g", 4), _operation("Compiled", "w g", "new", 4)]
    assert peak_bytes([Graph(operations, ["new"])], 0, changed, lag=Ahead(0)) / MB == 8


def test_what_is_evaluated_first_is_kept_until_the_second_graph_reads_it() -> None:
    """In one graph `b` is made when `a` was read."""
    first = [_operation("Matmul", "x", "a", 4), _operation("Matmul", "x", "b", 4)]
    second = [_operation("Reduce", "a", "c"), _operation("Concatenate", "b c", "d")]
    assert _peak([*first, *second], "d") == 1 + 1 + 4 + 1
    graphs = [Graph(first, ["a", "b"]), Graph(second, ["d"])]
    assert peak_bytes(graphs, MB, {}, lag=Ahead(0)) / MB == 1 + 4 + 4 + 1
