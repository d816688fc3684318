"""Frozen weights of layers, split between the ranks, beside adapters that every rank has whole.

A layer gathers its frozen weights where it is called, and again in the backward pass if it is recomputed. They have no
gradients, so no backend lacks what it takes, and the sums of the adapters' gradients are those of whole layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.distributed.team import Team
from mlxflow.ops import patching

# Weights of fewer bytes for each rank are whole on every rank
_FEW = 1024


class _WholeForm(NamedTuple):
    """Shape and dtype of a whole weight."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


class _FrozenLayer(NamedTuple):
    """A layer whose frozen weights are split along their first axis.

    Attributes:
        module: the layer.
        forms: of the whole weights that are split, by their names in the layer.
    """

    module: nn.Module
    forms: dict[str, _WholeForm]


class FrozenShards:
    """The frozen weights of a model's layers, split between the ranks.

    Args:
        model: its layers are the attribute `layers`; whole, with adapters beside frozen weights, dense or quantized.
        team: of this process.
    """

    def __init__(self, model: nn.Module, team: Team) -> None:
        self._team = team
        self._is_whole = False
        self._layers = [_FrozenLayer(layer, self._split_forms(layer)) for layer in model.layers]
        self._parts: list[dict[str, mx.array]] = []

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Split the weights, and let the layers gather them, until the block ends."""
        for one in self._layers:
            leaves = dict(tree_flatten(one.module.parameters()))
            self._parts.append({path: self._own(leaves[path]) for path in one.forms})
            mx.eval(self._parts[-1])
            del leaves
            _put(one.module, self._parts[-1])
        with patching.layer_classes([(one.module, self._gathering(one)) for one in self._layers], by=__name__):
            yield self

    def make_whole(self) -> None:
        """Gather all weights into the model, one layer after another; a collective."""
        for one, parts in zip(self._layers, self._parts, strict=True):
            whole = self._gathered(one, parts)
            mx.eval(whole)
            _put(one.module, whole)
        self._is_whole = True

    def split_again(self) -> None:
        """Drop what `make_whole` gathered, except for this rank's parts."""
        for one, parts in zip(self._layers, self._parts, strict=True):
            _put(one.module, parts)
        self._is_whole = False

    def _split_forms(self, layer: nn.Module) -> dict[str, _WholeForm]:
        trainable = dict(tree_flatten(layer.trainable_parameters()))
        count = self._team.size
        return {
            path: _WholeForm(leaf.shape, leaf.dtype)
            for path, leaf in tree_flatten(layer.parameters())
            if path not in trainable and leaf.ndim > 1 and leaf.shape[0] % count == 0 and leaf.nbytes >= _FEW * count
        }

    def _own(self, leaf: mx.array) -> mx.array:
        rows = leaf.shape[0] // self._team.size
        begin = rows * self._team.rank.number
        return mx.contiguous(leaf[begin : begin + rows])

    def _gathered(self, layer: _FrozenLayer, parts: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the whole weights of a layer from the parts of all ranks: one collective, of bytes of any dtype."""
        if not parts:
            return {}
        rows = [part.reshape(1, -1).view(mx.uint8) for part in parts.values()]
        gathered = self._team.gather_within(mx.concatenate(rows, axis=1))
        whole, begin = {}, 0
        for row, (path, form) in zip(rows, layer.forms.items(), strict=True):
            end = begin + row.shape[1]
            whole[path] = mx.contiguous(gathered[:, begin:end]).view(form.dtype).reshape(form.shape)
            begin = end
        return whole

    def _gathering(self, layer: _FrozenLayer) -> type[nn.Module]:
        plain = type(layer.module)
        shards = self

        def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            if shards._is_whole or not layer.forms:
                return plain.__call__(self, *arguments, **named)
            leaves = dict(tree_flatten(self.parameters()))
            parts = {path: leaves[path] for path in layer.forms}
            _put(self, shards._gathered(layer, parts))
            try:
                return plain.__call__(self, *arguments, **named)
            finally:
                _put(self, parts)

        return type(f"GatheringFrozen{plain.__name__}", (plain,), {"__call__": call})


def _put(module: nn.Module, leaves: dict[str, mx.array]) -> None:
    module.update(tree_unflatten(list(leaves.items())))
