"""Find groups of layers in a block whose input channels can be scaled without changing the block's output.

AWQ multiplies columns of weights by scales and divides the preceding layer by them: a norm, or the rows of another
linear layer. Which layers belong together depends on the architecture. Here a block is run once while the inputs of its
layers are recorded, layers that read the output of a norm are grouped, and each candidate is tested with random scales:
it is accepted only if the block's output stays the same. Names of classes and layers are not used.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxflow.ops.patching import layer_method

#: Runs a block on fixed inputs; returns its outputs.
Run = Callable[[], list[mx.array]]

# Relative change of fp32 outputs that scaling and rounding may cause; a wrong group causes far more
_TOLERANCE = 1e-3

# Relative difference of the moments of inputs with the same rows, permuted or repeated for each expert
_SAME_MOMENTS = 1e-4


class Group(NamedTuple):
    """Layers that are scaled together.

    Attributes:
        source: path of the layer whose output channels are divided by the scales.
        rows: the rows of its weight that are these channels; None for a norm, where all numbers are.
        adds_one: whether the source is a norm that multiplies by one plus its weight, as in Gemma.
        layers: paths of the layers whose input channels are multiplied.
    """

    source: str
    rows: tuple[int, int] | None
    adds_one: bool
    layers: tuple[str, ...]


class Noted(NamedTuple):
    """A recorded call of a module in a run of its block.

    Attributes:
        place: its position in the order in which the block's modules returned.
        inputs: positional arguments.
        named: keyword arguments.
        y: the result; None if it is no array.
    """

    place: int
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    y: mx.array | None

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.inputs[0] if self.inputs else None


def noted(block: nn.Module, run: Run) -> dict[str, Noted]:
    """Return the recorded call of every module of a block that is called exactly once.

    Args:
        block: a block of a model.
        run: runs it.
    """
    recorded: dict[str, list[Noted]] = {}
    count = iter(range(1 << 30))

    def noting(path: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def noted_call(self: Any, *inputs: Any, **named: Any) -> Any:
                result = call(self, *inputs, **named)
                y = result if isinstance(result, mx.array) else None
                recorded.setdefault(path, []).append(Noted(next(count), inputs, named, y))
                return result

            return noted_call

        return make

    modules = {id(module): (path, module) for path, module in block.named_modules() if path and callable(module)}
    with ExitStack() as stack:
        for path, module in modules.values():
            stack.enter_context(layer_method(module, "__call__", noting(path), by=__name__))
        run()
    once = {path: calls[0] for path, calls in recorded.items() if len(calls) == 1}
    recorded.clear()  # see `layer_method`
    mx.eval([(one.x if isinstance(one.x, mx.array) else None, one.y) for one in once.values()])
    return once


def cast_to(dtype: mx.Dtype, inputs: Any) -> Any:
    """Return arguments with floating arrays cast to a dtype."""

    def cast(value: Any) -> Any:
        return value.astype(dtype) if _is_floating(value) else value

    return tree_map(cast, inputs)


def weighted(block: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a block that have a weight of their own, by path."""
    return {path: layer for path, layer in block.named_modules() if path and "weight" in layer}


def find_groups(block: nn.Module, run: Run, calls: Mapping[str, Noted]) -> list[Group]:
    """Return the groups of a block in the order in which their layers are called.

    Args:
        block: unchanged afterwards.
        run: runs it.
        calls: from `noted` with the same run.
    """
    layers = weighted(block)
    calls = {path: one for path, one in calls.items() if path in layers}
    matrices = {path: one for path, one in calls.items() if layers[path].weight.ndim > 1 and _is_floating(one.x)}
    candidates = [*_after_norms(layers, calls, matrices), *_after_matrices(layers, matrices)]
    groups: dict[tuple[str, ...], Group] = {}
    with in_fp32(block):
        reference = run()
        for group in candidates:
            if group.layers not in groups and _holds(block, run, group, reference):
                groups[group.layers] = group
    return sorted(groups.values(), key=lambda group: max(calls[path].place for path in group.layers))


def apply_scales(block: nn.Module, group: Group, scales: mx.array) -> None:
    """Multiply the columns of a group's layers by scales, and divide its source by them.

    Args:
        block: changed.
        group: one of its groups.
        scales: (D,), positive.
    """
    layers = weighted(block)
    source = layers[group.source]
    for own in ("weight", "bias"):
        if isinstance(source.get(own), mx.array):
            source[own] = _divided(source[own], own, group, scales)
    for path in group.layers:
        weight = layers[path].weight
        layers[path].weight = (weight * scales).astype(weight.dtype)


def _divided(value: mx.array, own: str, group: Group, scales: mx.array) -> mx.array:
    exact = value.astype(mx.float32)
    if group.rows is None:
        offset = 1.0 if group.adds_one and own == "weight" else 0.0
        return ((exact + offset) / scales - offset).astype(value.dtype)
    begin, end = group.rows
    where = (..., slice(begin, end), slice(None)) if own == "weight" else (..., slice(begin, end))
    exact[where] = exact[where] / (scales[:, None] if own == "weight" else scales)
    return exact.astype(value.dtype)


def _after_norms(
    layers: Mapping[str, nn.Module], calls: Mapping[str, Noted], matrices: Mapping[str, Noted]
) -> Iterator[Group]:
    """Yield for each norm the layers that read its output."""
    norms = {path: one for path, one in calls.items() if layers[path].weight.ndim == 1 and one.y is not None}
    returned = {id(norm.y) for norm in norms.values()}
    for path, one in norms.items():
        readers = [
            other
            for other, call in matrices.items()
            if (call.x is one.y if id(call.x) in returned else _holds_rows_of(call, one))
        ]
        has_same_width = all(layers[other].weight.shape[-1] == layers[path].weight.shape[0] for other in readers)
        for adds_one in (False, True):
            if readers and has_same_width:
                yield Group(path, None, adds_one, tuple(readers))


def _holds_rows_of(call: Noted, source: Noted) -> bool:
    """Return whether a layer reads the output of another, possibly permuted or repeated for each expert."""
    y = source.y
    if y is None or call.place < source.place or call.x.shape[-1] != y.shape[-1] or call.x.size % y.size:
        return False
    ours, theirs = _moments(call.x), _moments(y)
    return float(mx.abs(ours - theirs).max()) <= _SAME_MOMENTS * float(mx.abs(theirs).max())


def _moments(x: mx.array) -> mx.array:
    """Return the mean, mean magnitude and mean square of each channel, (3, D)."""
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return mx.stack([rows.mean(axis=0), mx.abs(rows).mean(axis=0), rows.square().mean(axis=0)])


def _after_matrices(layers: Mapping[str, nn.Module], matrices: Mapping[str, Noted]) -> Iterator[Group]:
    """Yield for each layer the earlier ones whose rows, or the first or last of them, may be its input channels."""
    for path, call in matrices.items():
        width = layers[path].weight.shape[-1]
        for other, before in matrices.items():
            weight = layers[other].weight
            if before.place >= call.place or weight.shape[:-2] != layers[path].weight.shape[:-2]:
                continue
            height = weight.shape[-2]
            if height >= width:
                yield Group(other, (height - width, height), adds_one=False, layers=(path,))
            if height > width:
                yield Group(other, (0, width), adds_one=False, layers=(path,))


def _holds(block: nn.Module, run: Run, group: Group, reference: list[mx.array]) -> bool:
    """Return whether a block's output is unchanged with a group scaled at random."""
    before = block.parameters()
    width = weighted(block)[group.layers[0]].weight.shape[-1]
    apply_scales(block, group, mx.array(2 ** np.random.default_rng(0).uniform(-1, 1, width).astype(np.float32)))
    try:
        outputs = run()
    except ValueError:  # shapes differ: the source has other channels
        return False
    finally:
        block.update(before)
    return all(_is_near(one, other) for one, other in zip(outputs, reference, strict=True))


def _is_near(output: mx.array, reference: mx.array) -> bool:
    return float(mx.abs(output - reference).max()) <= _TOLERANCE * float(mx.abs(reference).max())


@contextmanager
def in_fp32(block: nn.Module) -> Iterator[None]:
    """Cast the arrays of a module to fp32 until the block ends."""
    before = block.parameters()
    block.update(cast_to(mx.float32, before))
    try:
        yield
    finally:
        block.update(before)


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
