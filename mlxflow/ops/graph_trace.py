"""The graph of operations of a function that derives gradients, as MLX would evaluate it; nothing is computed.

`mx.export_function` gives the graph of a function, but not with custom functions or gradient checkpoints in it. While a
gradient is derived, their results are placeholders here, and so are the gradients of their arguments. What they compute
is traced beside them, and the placeholders are replaced by it in the finished graph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.ops import patching
from mlxflow.ops.custom_function import CustomFunction, recorded

_vjp: Any = mx.vjp

#: MLX's name of the operation that ends a custom function: of its arguments and what it computed, which it passes on.
CUSTOM = "CustomTransforms"


class Value(NamedTuple):
    """An array of a graph: its name, shape and bytes a number."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        count = self.itemsize
        for size in self.shape:
            count *= size
        return count


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
    tracer = _Tracer()
    parts: dict[str, Any] = {}
    operations: list[Operation] = []

    def values(listed: Iterable[tuple[str, Any, mx.Dtype]]) -> tuple[Value, ...]:
        return tuple(Value(prefix + name, tuple(shape), dtype.size) for name, shape, dtype in listed)

    def take(part: dict[str, Any]) -> None:
        if part["type"] != "primitive":
            parts[part["type"]] = part.get(part["type"])
            return
        inputs, outputs = values(part["inputs"]), values(part["outputs"])
        names = tuple(value.name for value in inputs)
        operations.append(Operation(part["name"], repr(part["arguments"]), names, outputs))

    def traced(*arrays: mx.array) -> list[mx.array]:
        results = list(function(*arrays))
        return [*results, *(array for link in tracer.links for array in link), *tracer.listed_calls()]

    replaced = ((mx, "vjp", tracer.vjp), (mx, "value_and_grad", tracer.value_and_grad))
    with patching.attributes(*replaced, (mx, "checkpoint", tracer.checkpoint), by=__name__), recorded(tracer):
        mx.export_function(take, traced, *arguments)
    return _connected(operations, values(parts["inputs"]), values(parts["outputs"]), tracer)


def _connected(
    operations: list[Operation], inputs: Sequence[Value], outputs: Sequence[Value], tracer: "_Tracer"
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
    renamed = [one._replace(inputs=tuple(links.get(name, name) for name in one.inputs)) for one in operations]
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


class _Call(NamedTuple):
    arguments: list[mx.array]
    computed: list[mx.array]
    results: list[mx.array]  # placeholders


class _Derivation:
    """The calls of custom functions within a function that is differentiated.

    Args:
        placeholders: of the results of each call; None while calls are counted.
    """

    def __init__(self, placeholders: Sequence[list[mx.array]] | None = None) -> None:
        self.placeholders = placeholders
        self.results: list[list[mx.array]] = []
        self.calls: list[tuple[CustomFunction, tuple[mx.array, ...]]] = []
        self.gives_one: list[bool] = []


class _Tracer:
    """Takes the place of MLX's functions that derive gradients, and of custom functions."""

    def __init__(self) -> None:
        self.links: list[tuple[mx.array, mx.array]] = []  # a placeholder, and what it stands for
        self.calls: list[_Call] = []
        self._derivations: list[_Derivation | None] = [None]
        self._count = 0

    def call(self, function: CustomFunction, arguments: tuple[Any, ...]) -> Any:
        """Return the results of a custom function, or placeholders while a gradient is derived."""
        derivation = self._derivations[-1]
        if derivation is not None and derivation.placeholders is not None:
            number = len(derivation.calls)
            derivation.calls.append((function, arguments))
            results = derivation.placeholders[number]
            return results[0] if derivation.gives_one[number] else tuple(results)
        computed = self._within(None, function.forward, *arguments)
        if derivation is not None:
            derivation.calls.append((function, arguments))
            derivation.results.append(_listed(computed))
            derivation.gives_one.append(isinstance(computed, mx.array))
        return computed

    def listed_calls(self) -> list[mx.array]:
        """Return the arrays of all calls."""
        return [array for call in self.calls for part in call for array in part]

    def vjp(
        self, function: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Do what `mx.vjp` does."""
        counted = _Derivation()
        num_results = len(_listed(self._within(counted, function, *primals)))
        num_primals = len(primals)
        outer = [[self._placeholder(value) for value in results] for results in counted.results]
        given = [self._placeholder(value) for _, arguments in counted.calls for value in _floating(arguments)]
        made = _Derivation()
        made.gives_one = counted.gives_one

        def augmented(*arrays: mx.array) -> list[mx.array]:
            left = iter(arrays[num_primals:])
            made.placeholders = [[next(left) for _ in results] for results in outer]
            results = _listed(self._within(made, function, *arrays[:num_primals]))
            return [*results, *(value for _, arguments in made.calls for value in _floating(arguments))]

        flat = [value for results in outer for value in results]
        results, gradients = _vjp(augmented, [*primals, *flat], [*cotangents, *given])
        incoming, wanted = iter(gradients[num_primals:]), iter(given)
        for number, (called, arguments) in enumerate(made.calls):
            cotangents_of = [next(incoming) for _ in outer[number]]
            self._connect(called, arguments, outer[number], cotangents_of, wanted, gives_one=made.gives_one[number])
        return list(results[:num_results]), list(gradients[:num_primals])

    def _connect(
        self,
        function: CustomFunction,
        arguments: tuple[Any, ...],
        results: list[mx.array],
        incoming: list[mx.array],
        wanted: Iterator[mx.array],
        *,
        gives_one: bool,
    ) -> None:
        """Trace what a call computes, and its gradients."""
        computed = _listed(self._within(None, function.forward, *arguments))
        self.calls.append(_Call(list(arguments), computed, results))
        if function.gradients is None:
            gradients = self.vjp(function.forward, arguments, incoming)[1]
        else:
            primals = arguments if len(arguments) > 1 else arguments[0]
            values = (incoming[0], results[0]) if gives_one else (tuple(incoming), tuple(results))
            gradients = _listed(self._within(None, function.gradients, primals, *values))
        for argument, gradient in zip(arguments, gradients, strict=False):
            if _is_floating(argument):
                self.links.append((next(wanted), gradient))

    def value_and_grad(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Do what `mx.value_and_grad` does for the first argument, a tree, and the first of several results."""

        def call(tree: Any, *others: Any) -> tuple[Any, Any]:
            flat = tree_flatten(tree)
            shape: list[Any] = []

            def of_leaves(*leaves: mx.array) -> list[mx.array]:
                results = function(
                    tree_unflatten([(name, leaf) for (name, _), leaf in zip(flat, leaves, strict=True)]), *others
                )
                shape[:] = [isinstance(results, mx.array)]
                return _listed(results)

            leaves = [leaf for _, leaf in flat]
            count = len(_listed(self._within(_Derivation(), of_leaves, *leaves)))
            cotangents = [mx.array(1.0), *(mx.array(0.0) for _ in range(count - 1))]
            results, gradients = self.vjp(of_leaves, leaves, cotangents)
            value = results[0] if shape[0] else tuple(results)
            return value, tree_unflatten([(name, one) for (name, _), one in zip(flat, gradients, strict=True)])

        return call

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Do what `mx.checkpoint` does."""

        def call(*arguments: Any) -> Any:
            flat = tree_flatten(list(arguments))

            def forward(*leaves: mx.array) -> Any:
                return function(*tree_unflatten([(name, leaf) for (name, _), leaf in zip(flat, leaves, strict=True)]))

            def gradients(primals: Any, incoming: Any, results: Any) -> list[mx.array]:
                late = mx.depends(_listed(primals), _listed(results))
                return self.vjp(forward, late, _listed(incoming))[1]

            known = CustomFunction(forward)
            known.vjp(gradients)
            return self.call(known, tuple(leaf for _, leaf in flat))

        return call

    def _placeholder(self, like: mx.array) -> mx.array:
        """Return an array of another number each time, since export merges equal ones."""
        self._count += 1
        return mx.full(like.shape, mx.array(self._count + 0.5).astype(like.dtype))

    def _within(self, derivation: _Derivation | None, function: Callable[..., Any], *arguments: Any) -> Any:
        self._derivations.append(derivation)
        try:
            return function(*arguments)
        finally:
            self._derivations.pop()


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, mx.array) else list(values)


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _floating(values: Iterable[Any]) -> list[mx.array]:
    return [value for value in values if _is_floating(value)]
