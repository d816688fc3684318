"""Layers whose weights are split between the ranks (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054).

As in `mlx.nn.fully_shard`, a layer gathers its weights where it is called, and its gradients are added and scattered
where the backward pass has computed them. Unlike there, sums are in fp32 and not divided, and the names of the weights
stay as they are. A recomputed layer gathers its weights again in the backward pass. Embeddings, the last norm and the
head are whole on every rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.distributed.team import Team
from mlxflow.ops import patching
from mlxflow.training.flat_parameters import FlatLayout, is_split
from mlxflow.training.gradient_packing import Gradients

# Weights of fewer numbers for each rank are whole on every rank
_FEW = 1024

#: Returns a figure of an array, such as the sum of its squares: a scalar in fp32.
Figure = Callable[[mx.array], mx.array]


class _Layer(NamedTuple):
    """A layer whose weights are split along their first axis.

    Attributes:
        module: the layer.
        name: of the layer in the model.
        shapes: of the whole weights that are split, by their names in the layer.
    """

    module: nn.Module
    name: str
    shapes: dict[str, tuple[int, ...]]


class ShardedLayers:
    """The layers of a model, split between the ranks.

    Args:
        model: its layers are the attribute `layers`; whole.
        team: of this process.

    Attributes:
        paths: of the weights that are split, in the tree of the model's trainable weights.
        is_whole: whether the model holds whole weights now, and its layers gather nothing.
    """

    def __init__(self, model: nn.Module, team: Team) -> None:
        self._model = model
        self._team = team
        trainable = tree_flatten(model.trainable_parameters())
        self._whole_tree: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {
            path: (leaf.shape, leaf.dtype) for path, leaf in trainable
        }
        names = {id(module): name for name, module in model.named_modules()}
        self._layers = [
            _Layer(
                layer,
                names[id(layer)],
                {
                    path: leaf.shape
                    for path, leaf in tree_flatten(layer.trainable_parameters())
                    if leaf.ndim and leaf.shape[0] % team.size == 0 and leaf.size >= _FEW * team.size
                },
            )
            for layer in model.layers
        ]
        self._shapes = {f"{one.name}.{path}": shape for one in self._layers for path, shape in one.shapes.items()}
        self.paths = frozenset(self._shapes)
        self.is_whole = False

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Split the weights, and let the layers gather them, until the block ends."""
        self._set({path: self._own(leaf) for path, leaf in self._leaves().items() if path in self._shapes})
        changes = [(one.module, self._gathering(one)) for one in self._layers]
        with patching.layer_classes(changes, by=__name__):
            yield self

    def make_whole(self) -> None:
        """Gather all weights into the model, one after another; a collective."""
        for path, part in sorted(self._leaves().items()):
            if path in self._shapes:
                whole = self._gathered(part.reshape(1, -1)).reshape(self._shapes[path])
                mx.eval(whole)
                self._set({path: whole})
        self.is_whole = True

    def sum_over(self, arrays: Mapping[str, mx.array], figure: Figure) -> list[mx.array]:
        """Return a figure of each array of gradients, to add: of split ones, one sum over all ranks; a collective.

        Args:
            arrays: long arrays by the names of `layout`.
            figure: of an array.
        """
        whole = [figure(array) for name, array in arrays.items() if not is_split(name)]
        parts = [figure(array) for name, array in arrays.items() if is_split(name)]
        return [*whole, self._team.gather_within(mx.stack(parts).sum().reshape(1)).sum()] if parts else whole

    def whole_state(self, state: Any, layout: FlatLayout) -> Any:
        """Return the state of an update as one process has it; a collective, whose arrays only rank 0 keeps.

        Args:
            state: a tree with long arrays of this rank.
            layout: of them.
        """

        def gather(leaf: mx.array, path: str) -> mx.array:
            if path in self._shapes:
                leaf = self._gathered(leaf.reshape(1, -1)).reshape(self._shapes[path])
                mx.eval(leaf)
            return leaf

        whole = self._changed(state, layout, self._whole_layout(layout), gather)
        if not self._team.rank.is_first:
            mx.eval(whole)
            return _mapped(whole, lambda array: mx.zeros(0, array.dtype) if array.size > 1 else array)
        return whole

    def state_like(self, state: Any, layout: FlatLayout) -> Any:
        """Return a tree of arrays, which are never computed, of the shapes and dtypes of `whole_state`."""
        return self._changed(
            state, layout, self._whole_layout(layout), lambda leaf, path: mx.zeros(self._shape(path), leaf.dtype)
        )

    def own_state(self, state: Any, layout: FlatLayout) -> Any:
        """Return the state of an update with this rank's parts for whole weights."""
        return self._changed(
            state,
            self._whole_layout(layout),
            layout,
            lambda leaf, path: self._own(leaf) if path in self._shapes else leaf,
        )

    def own_sums(self, gradients: Gradients) -> Gradients:
        """Return sums that one process began, (whole weights), as this rank adds to them.

        Split weights: this rank's part; all other sums: on rank 0 alone.
        """
        is_first = self._team.rank.is_first
        own = {
            path: self._own(leaf) if path in self._shapes else leaf if is_first else mx.zeros_like(leaf)
            for path, leaf in tree_flatten(gradients.tree)
        }
        scale = 1.0 if is_first else 0.0
        return Gradients(gradients.total * scale, gradients.targets * scale, tree_unflatten(list(own.items())))

    def tree_like(self) -> Any:
        """Return a tree of arrays, which are never computed, like the whole trainable weights."""
        return tree_unflatten([(path, mx.zeros(shape, dtype)) for path, (shape, dtype) in self._whole_tree.items()])

    def _shape(self, path: str) -> tuple[int, ...]:
        shape, _ = self._whole_tree[path]
        return shape

    def _whole_layout(self, layout: FlatLayout) -> FlatLayout:
        """Return the layout of one process; the dtypes are those of this rank's layout."""
        dtypes = {path: name for name, places in layout.places.items() for path, _ in places}
        tree = [
            (path, mx.zeros(shape, mx.float32 if "float32" in dtypes[path] else dtype))
            for path, (shape, dtype) in self._whole_tree.items()
        ]
        return FlatLayout(tree_unflatten(tree))

    def _changed(
        self, tree: Any, before: FlatLayout, after: FlatLayout, change: Callable[[mx.array, str], mx.array]
    ) -> Any:
        """Return a tree whose long arrays are those of another layout, with changed leaves."""
        if isinstance(tree, list | tuple):
            return [self._changed(value, before, after, change) for value in tree]
        if not isinstance(tree, dict):
            return tree
        long = {name: tree[name] for name in before.places if name in tree}
        others = {key: self._changed(value, before, after, change) for key, value in tree.items() if key not in long}
        if not long:
            return others
        if any(isinstance(value, mx.array) for value in long.values()):
            return {**others, **self._converted(long, before, after, change)}
        return {**others, **self._converted_figures(long, before, after, change)}

    def _converted_figures(
        self,
        figures: Mapping[str, Mapping[str, mx.array]],
        before: FlatLayout,
        after: FlatLayout,
        change: Callable[[mx.array, str], mx.array],
    ) -> dict[str, dict[str, mx.array]]:
        """Return several arrays for each long array, such as its moments, in another layout."""
        paths = {path for name in figures for path, _ in before.places[name]}
        known = [name for name, places in after.places.items() if all(path in paths for path, _ in places)]
        found: dict[str, dict[str, mx.array]] = {name: {} for name in known}
        for kind in sorted({kind for value in figures.values() for kind in value}):
            arrays = {name: value[kind] for name, value in figures.items()}
            for name, array in self._converted(arrays, before, after, change).items():
                found[name][kind] = array
        return found

    def _converted(
        self,
        arrays: dict[str, mx.array],
        before: FlatLayout,
        after: FlatLayout,
        change: Callable[[mx.array, str], mx.array],
    ) -> dict[str, mx.array]:
        leaves = {path: change(leaf, path) for path, leaf in before.leaves(arrays).items()}
        return after.gather_known(leaves)

    def _gathering(self, layer: _Layer) -> type[nn.Module]:
        plain = type(layer.module)
        gather = self._gather_function(list(layer.shapes.values()))
        sharded = self

        def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            if sharded.is_whole or not layer.shapes:
                return plain.__call__(self, *arguments, **named)
            leaves = dict(tree_flatten(self.trainable_parameters()))
            parts = [leaves[path] for path in layer.shapes]
            self.update(tree_unflatten(list(zip(layer.shapes, gather(parts), strict=True))))
            try:
                return plain.__call__(self, *arguments, **named)
            finally:
                self.update(tree_unflatten(list(zip(layer.shapes, parts, strict=True))))

        return type(f"Gathering{plain.__name__}", (plain,), {"__call__": call})

    def _gather_function(self, shapes: list[tuple[int, ...]]) -> Callable[[list[mx.array]], list[mx.array]]:
        """Return a function that gathers the parts of some weights, and whose gradient adds and scatters.

        Args:
            shapes: of the whole weights.
        """
        count = self._team.size

        @mx.custom_function
        def gather(parts: list[mx.array]) -> list[mx.array]:
            rows = self._gathered(mx.concatenate([part.reshape(1, -1) for part in parts], axis=1))
            return [one.reshape(shape) for one, shape in zip(_split(rows, parts), shapes, strict=True)]

        @gather.vjp
        def gather_vjp(parts: list[mx.array], cotangents: list[mx.array], _: Any) -> list[mx.array]:
            rows = mx.concatenate([one.reshape(count, -1).astype(mx.float32) for one in cotangents], axis=1)
            own = self._team.sum_part_within(rows)
            return [one.reshape(part.shape) for one, part in zip(_split(own, parts), parts, strict=True)]

        return cast("Callable[[list[mx.array]], list[mx.array]]", gather)

    def _gathered(self, part: mx.array) -> mx.array:
        """Return the rows of all ranks, (number of ranks, N)."""
        return self._team.gather_within(part)

    def _own(self, leaf: mx.array) -> mx.array:
        rows = leaf.shape[0] // self._team.size
        begin = rows * self._team.rank.number
        return mx.contiguous(leaf[begin : begin + rows])

    def _leaves(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._model.trainable_parameters()))

    def _set(self, leaves: Mapping[str, mx.array]) -> None:
        mx.eval(leaves)
        self._model.update(tree_unflatten(list(leaves.items())))


def _split(rows: mx.array, parts: list[mx.array]) -> list[mx.array]:
    """Return the columns of rows that belong to each part."""
    found, begin = [], 0
    for part in parts:
        found.append(rows[:, begin : begin + part.size])
        begin += part.size
    return found


def _mapped(tree: Any, function: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_mapped(value, function) for value in tree]
    return function(tree) if isinstance(tree, mx.array) else tree
