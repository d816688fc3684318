"""Follow the calls of custom functions and checkpoints while gradients are derived.

Their results are placeholders, and so are the gradients of their arguments; what they compute is traced beside them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.ops.custom_function import CustomFunction

_vjp: Any = mx.vjp


class Call(NamedTuple):
    """A call of a custom function; its results are placeholders."""

    arguments: list[mx.array]
    computed: list[mx.array]
    results: list[mx.array]  # placeholders


class Derivation:
    """The calls of custom functions within a function that is differentiated.

    Args:
        placeholders: of the results of each call; None while calls are counted.
    """

    def __init__(self, placeholders: Sequence[list[mx.array]] | None = None) -> None:
        self.placeholders = placeholders
        self.results: list[list[mx.array]] = []
        self.calls: list[tuple[CustomFunction, tuple[mx.array, ...]]] = []
        self.gives_one: list[bool] = []
        self.needless: set[int] = set()

    def disregard(self, result: mx.array) -> None:
        """Leave out the call that returned a result: its gradient is zero."""
        known = self.results if self.placeholders is None else self.placeholders
        self.needless |= {number for number, results in enumerate(known) if any(one is result for one in results)}

    def needed(self) -> list[tuple[int, CustomFunction, tuple[mx.array, ...]]]:
        """Return the calls that something needs, with their numbers."""
        return [(number, *call) for number, call in enumerate(self.calls) if number not in self.needless]


# Stands for the derivation of a function that is called to count the calls in it
_UNUSED = Derivation()


class Tracer:
    """Takes the place of MLX's functions that derive gradients, and of custom functions."""

    def __init__(self) -> None:
        self.links: list[tuple[mx.array, mx.array]] = []  # a placeholder, and what it stands for
        self.calls: list[Call] = []
        self._derivations: list[Derivation | None] = [None]
        self._count = 0

    def call(self, function: CustomFunction, arguments: tuple[Any, ...]) -> Any:
        """Return the results of a custom function, or placeholders while a gradient is derived."""
        derivation = self._derivations[-1]
        if derivation is not None and derivation.placeholders is not None:
            number = len(derivation.calls)
            derivation.calls.append((function, arguments))
            results = derivation.placeholders[number]
            return results[0] if derivation.gives_one[number] else tuple(results)
        if derivation is None:
            return self._call_outside(function, arguments)
        computed = self._within(_UNUSED, function.forward, *arguments)
        if derivation is not _UNUSED:
            derivation.calls.append((function, arguments))
            derivation.results.append(_listed(computed))
            derivation.gives_one.append(isinstance(computed, mx.array))
        return computed

    def _call_outside(self, function: CustomFunction, arguments: tuple[Any, ...]) -> Any:
        """Return placeholders of the results of a call that is not differentiated."""
        computed = self._within(None, function.forward, *arguments)
        # Made of the traced array: a function of arrays that are not traced would be compiled, and not be exported
        results = [value + self._placeholder(value) for value in _listed(computed)]
        self.calls.append(Call(list(arguments), _listed(computed), results))
        return results[0] if isinstance(computed, mx.array) else tuple(results)

    def disregard(self, result: mx.array) -> None:
        """Leave out the call that returned a result from the derivation that it is part of."""
        derivation = self._derivations[-1]
        if derivation is not None:
            derivation.disregard(result)

    def listed_calls(self) -> list[mx.array]:
        """Return the arrays of all calls."""
        return [array for call in self.calls for part in call for array in part]

    def vjp(
        self, function: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Do what `mx.vjp` does."""
        counted = Derivation()
        num_results = len(_listed(self._within(counted, function, *primals)))
        num_primals = len(primals)
        outer = [[self._placeholder(value) for value in results] for results in counted.results]
        given = [self._placeholder(value) for _, _, arguments in counted.needed() for value in _floating(arguments)]
        made = Derivation()
        made.gives_one = counted.gives_one

        def augmented(*arrays: mx.array) -> list[mx.array]:
            left = iter(arrays[num_primals:])
            made.placeholders = [[next(left) for _ in results] for results in outer]
            results = _listed(self._within(made, function, *arrays[:num_primals]))
            # MLX's derivation takes one gradient for an array that is returned twice: each argument is another one
            return [*results, *(value + 0 for _, _, arguments in made.needed() for value in _floating(arguments))]

        flat = [value for results in outer for value in results]
        results, gradients = _vjp(augmented, [*primals, *flat], [*cotangents, *given])
        left, wanted = iter(gradients[num_primals:]), iter(given)
        incoming = [[next(left) for _ in results] for results in outer]
        for number, called, arguments in made.needed():
            cotangents_of = incoming[number]
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
        self.calls.append(Call(list(arguments), computed, results))
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
            count = len(_listed(self._within(Derivation(), of_leaves, *leaves)))
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

    def _within(self, derivation: Derivation | None, function: Callable[..., Any], *arguments: Any) -> Any:
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
