"""The graph that `mx.compile` returns for a function: equal operations merged, elementwise ones fused.

The rules are those of MLX 0.32 (`mlx/compile.cpp`).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mlxflow.ops.graph_trace import Operation, Traced, Value, in_order

_UNARY = (
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType BitwiseInvert Ceil Conjugate Cos Cosh Erf ErfInv Exp "
    "Expm1 Floor Imag Log Log1p Log2 Log10 LogicalNot Negative Real Round Rsqrt Sigmoid Sign Sin Sinh Sqrt Square Tan "
    "Tanh"
)
_BINARY = (
    "Add ArcTan2 BitwiseBinary Divide Equal Greater GreaterEqual Less LessEqual LogAddExp "
    "LogicalAnd LogicalOr Maximum Minimum Multiply NaNEqual NotEqual Power Remainder Subtract"
)
#: Operations of one number of each input.
ELEMENTWISE = frozenset((_UNARY + " " + _BINARY + " Select").split())
_NO_OPERATION = frozenset(("Copy", "StopGradient"))
# MLX takes no two of them for equal
_NEVER_EQUAL = frozenset(("CustomKernel",))

# Bounds of MLX's fusion
_MAX_DEPTH, _MAX_INPUTS = 11, 24


class Graph(NamedTuple):
    """A graph of operations.

    Attributes:
        operations: in an order in which they can run.
        results: names of the values that are kept.
        inputs: values that the operations take from outside.
    """

    operations: Sequence[Operation]
    results: Sequence[str]
    inputs: Sequence[Value] = ()


def compiled(traced: Traced) -> Graph:
    """Return the graph that `mx.compile` returns for a function's; its results are in the same order."""
    graph = Graph(traced.operations, [value.name for value in traced.outputs], traced.inputs)
    return _fused(_simplified(graph))


def _simplified(graph: Graph) -> Graph:
    """Return a graph with equal operations merged, without copies and without operations that nothing needs."""
    renamed: dict[str, str] = {}
    known: dict[tuple[str, str, tuple[str, ...]], Operation] = {}
    kept = []
    for traced in graph.operations:
        operation = traced.with_inputs(renamed)
        if operation.name in _NO_OPERATION:
            renamed[operation.outputs[0].name] = operation.inputs[0]
            continue
        same = known.setdefault((operation.name, operation.arguments, operation.inputs), operation)
        is_alone = not operation.inputs or operation.name in _NEVER_EQUAL
        if same is operation or is_alone:  # MLX compares those that share an input: ranges stay
            kept.append(operation)
            continue
        for value, other in zip(operation.outputs, same.outputs, strict=True):
            renamed[value.name] = other.name
    results = [renamed.get(name, name) for name in graph.results]
    return Graph(_needed(kept, results), results, graph.inputs)


def _needed(operations: Sequence[Operation], results: Iterable[str]) -> list[Operation]:
    needed, kept = set(results), []
    for operation in reversed(operations):
        if any(value.name in needed for value in operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def _fused(graph: Graph) -> Graph:
    """Return a graph in which groups of elementwise operations are one operation, as `mx.compile` makes them."""
    makers = {value.name: operation for operation in graph.operations for value in operation.outputs}
    users: dict[str, list[Operation]] = defaultdict(list)
    for operation in graph.operations:
        for name in operation.inputs:
            users[name].append(operation)
    results, done, made = set(graph.results), set[str](), dict[str, Operation]()
    for operation in reversed(graph.operations):
        name = operation.outputs[0].name
        if name in done or operation.name not in ELEMENTWISE:
            continue
        group = _group(operation, makers, users, results)
        if len(group) > 1:
            done.update(member for member in group if makers[member].name != "Broadcast")
            made[name] = _compiled([makers[member] for member in group], results, users, set(group))
    fresh = [
        made.get(one.outputs[0].name, one)
        for one in graph.operations
        if one.outputs[0].name in made or one.outputs[0].name not in done
    ]
    return graph._replace(operations=in_order(fresh, graph.results))


def _group(
    end: Operation, makers: Mapping[str, Operation], users: Mapping[str, list[Operation]], results: set[str]
) -> list[str]:
    """Return the names of the values that are fused with the last one; broadcasts may be computed twice."""
    shape = end.outputs[0].shape
    group: dict[str, None] = {}
    inputs: set[str] = set()

    def visit(name: str, depth: int) -> None:
        if name in group:
            return
        maker = makers.get(name)
        is_broadcast = maker is not None and maker.name == "Broadcast"
        if (
            depth >= _MAX_DEPTH
            or maker is None
            or not (is_broadcast or maker.name in ELEMENTWISE)
            or (name in results and maker.outputs[0].shape != shape)
        ):
            inputs.add(name)
            return
        alone = _is_needed_only_in(group, name, users)
        if depth and not alone and not is_broadcast:
            inputs.add(name)
            return
        inputs.discard(name)
        if len(inputs) >= _MAX_INPUTS:
            return
        group[name] = None
        for one in maker.inputs:
            visit(one, depth + 1)

    visit(end.outputs[0].name, 0)
    return list(group)


def _is_needed_only_in(group: Mapping[str, None], name: str, users: Mapping[str, list[Operation]]) -> bool:
    """Return whether all users of a value are in a group; a broadcast is if all of its own are: else it is split."""
    return all(
        user.outputs[0].name in group
        and (user.name != "Broadcast" or _is_needed_only_in(group, user.outputs[0].name, users))
        for user in users[name]
    )


def _compiled(
    members: Sequence[Operation], results: set[str], users: Mapping[str, list[Operation]], group: set[str]
) -> Operation:
    end = members[0].outputs[0]
    others = [one.outputs[0] for one in members[1:] if one.outputs[0].name in results]
    inputs = dict.fromkeys(name for one in members for name in one.inputs if name not in group)
    return Operation("Compiled", "", tuple(inputs), (end, *others))
