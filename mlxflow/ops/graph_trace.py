"""The graph of operations of a function that derives gradients, as MLX would evaluate it; nothing is computed.

`mx.export_function` gives the graph of a function, but not with custom functions or gradient checkpoints in it. While a
gradient is derived, their results are placeholders here, and so are the gradients of their arguments. What they compute
is traced beside them, and the placeholders are replaced by it in the finished graph.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.ops import patching
from mlxflow.ops.call_tracer import Tracer
from mlxflow.ops.custom_function import recorded

#: MLX's name of the operation that ends a custom function: of its arguments and what it computed, which it passes on.
CUSTOM = "CustomTransforms"


class Value(NamedTuple):
    """An array of a graph: its name, shape and bytes a number."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Number of all numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return self.itemsize * math.prod(self.shape)


class Operation(NamedTuple):
    """An operation of a graph.

    Attributes:
        name: of MLX's primitive.
        arguments: its other arguments, in words.
        inputs: names of arrays.
        outputs: what it computes.
    """

    name: str
    arguments: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]

    def with_inputs(self, names: Mapping[str, str]) -> "Operation":
        """Return the operation with some inputs replaced by others; itself if it has none of them."""
        if names.keys().isdisjoint(self.inputs):
            return self
        inputs = tuple([names.get(name, name) for name in self.inputs])
        return Operation(self.name, self.arguments, inputs, self.outputs)


class Traced(NamedTuple):
    """A traced function.

    Attributes:
        operations: in an order in which they can run.
        inputs: the function's arguments.
        outputs: what it returns.
    """

    operations: Sequence[Operation]
    inputs: Sequence[Value]
    outputs: Sequence[Value]


def trace(function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array], *, prefix: str) -> Traced:
    """Return the graph of a function; arrays that it captures are not part of it.

    Args:
        function: of arrays; returns arrays. It may derive gradients by `mx.value_and_grad`, `mx.vjp` and
            `mx.checkpoint`, which it looks up when it is called.
        arguments: give shapes and dtypes; they need not be evaluated.
        prefix: of the names.

    Raises:
        ValueError: the function uses an operation that cannot be exported.
    """
    tracer = Tracer()
    parts: dict[str, Any] = {}
    operations: list[Operation] = []

    def values(listed: Iterable[tuple[str, Any, mx.Dtype]]) -> tuple[Value, ...]:
        return tuple([Value(prefix + name, tuple(shape), dtype.size) for name, shape, dtype in listed])

    def take(part: dict[str, Any]) -> None:
        if part["type"] != "primitive":
            parts[part["type"]] = part.get(part["type"])
            return
        names = tuple([prefix + name for name, _, _ in part["inputs"]])
        operations.append(Operation(part["name"], repr(part["arguments"]), names, values(part["outputs"])))

    def traced(*arrays: mx.array) -> list[mx.array]:
        results = list(function(*arrays))
        return [*results, *(array for link in tracer.links for array in link), *tracer.listed_calls()]

    replaced: list[tuple[Any, str, Any]] = [
        (mx, "vjp", tracer.vjp),
        (mx, "value_and_grad", tracer.value_and_grad),
        (mx, "checkpoint", tracer.checkpoint),
    ]
    if _fuses_losses():
        replaced.append((mx.fast, "cross_entropy", _losses))
    with (
        patching.attributes(*replaced, by=__name__),
        recorded(tracer),
        _compiled_functions_inlined(),
    ):
        mx.export_function(take, traced, *arguments)
    return _connected(operations, values(parts["inputs"]), values(parts["outputs"]), tracer)


def _fuses_losses() -> bool:
    """Return whether `mx.fast.cross_entropy` is one operation, as on a GPU; MLX cannot export it."""
    return mx.default_device() != mx.cpu


def _losses(logits: mx.array, _targets: mx.array) -> mx.array:
    """Stand in for MLX's fused cross-entropy: as it, it reads the logits once, and makes a number for each row."""
    return mx.logsumexp(logits, axis=-1).astype(mx.float32)


@contextmanager
def _compiled_functions_inlined() -> Iterator[None]:
    """Let compiled functions, such as `nn.silu`, be called as they are written until the block ends.

    MLX does that for arrays that it traces. The arguments of a custom function are none once its derivation has ended,
    and a compiled operation cannot be exported.
    """
    if not _compiles():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _compiles() -> bool:
    """Return whether MLX compiles functions; it has no way to ask."""
    calls: list[mx.array] = []

    def counted(x: mx.array) -> mx.array:
        calls.append(x)
        return x

    function, zero = mx.compile(counted), mx.array(0.0)
    for _ in range(2):
        function(zero)
    return len(calls) == 1


def _connected(
    operations: list[Operation], inputs: Sequence[Value], outputs: Sequence[Value], tracer: Tracer
) -> Traced:
    """Return a graph in which placeholders are replaced by what they stand for.

    Args:
        operations: of the graph.
        inputs: of the function.
        outputs: its results, the links, and the arrays of the calls.
        tracer: with links and calls.
    """
    left = iter(outputs)
    count = len(outputs) - 2 * len(tracer.links) - len(tracer.listed_calls())
    results = [next(left) for _ in range(count)]
    links = {next(left).name: next(left).name for _ in tracer.links}
    for number, call in enumerate(tracer.calls):
        needed = tuple(next(left).name for _ in (*call.arguments, *call.computed))
        operations.append(Operation(CUSTOM, str(number), needed, tuple(next(left) for _ in call.results)))
    for name in links:
        while links[name] in links and links[name] != links[links[name]]:
            links[name] = links[links[name]]
    renamed = [one.with_inputs(links) for one in operations] if links else operations
    results = [value._replace(name=links.get(value.name, value.name)) for value in results]
    return Traced(in_order(renamed, [value.name for value in results]), inputs, results)


def in_order(operations: Sequence[Operation], results: Iterable[str]) -> list[Operation]:
    """Return the operations that some results need, each after those that it needs itself.

    Of two operations that give an array of the same name the later one is taken.

    Raises:
        ValueError: an operation needs its own result.
    """
    makers = {value.name: operation for operation in operations for value in operation.outputs}
    done: set[str] = set()
    begun: set[str] = set()
    ordered: list[Operation] = []
    stack = [makers[name] for name in reversed(list(results)) if name in makers]
    while stack:
        operation = stack[-1]
        missing = [makers[name] for name in operation.inputs if name in makers and name not in done]
        if missing:
            if operation.outputs[0].name in begun:
                raise ValueError(f"{operation.name}: an operation that needs its own result")
            begun.add(operation.outputs[0].name)
            stack += missing[::-1]
            continue
        stack.pop()
        if operation.outputs[0].name not in done:
            done.update(value.name for value in operation.outputs)
            ordered.append(operation)
    return ordered
