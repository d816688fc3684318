"""AWQ: search the scales and clipping limits with the least quantization error of a block's output.

Lin et al. 2023 (arXiv:2306.00978). The search for scales follows mlx-lm's `awq` and measures the error at the output
of the smallest module that contains the layers; the search for limits is mlx-lm's function. mlx-lm has a table of
architectures. Here the layers that share scales are found by running the block (`scale_groups`), with the inputs, masks
and positions that it takes in a forward pass of the whole model (`block_slices`). Rows are computed in slices, and what
all slices need lies in files: memory grows with the rows by the hidden states of one block alone.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.models.fp32_on_cpu import widened
from mlxflow.quantization.block_slices import StoredTree, block_inputs
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.scale_groups import Group, Noted, apply_scales, cast_to, find_groups, noted, weighted
from mlxflow.quantization.settings import Setting

# Names of layers whose weights are not clipped, as in AWQ: queries and keys need their outliers
_NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv", "c_attn", "kv_a", "kv_b", "embed_q")

_LEAST_SCALE = 1e-4

# Rows of a layer's inputs on which its limits are searched, as in mlx-lm
_CLIPPING_ROWS = 512

#: Runs a module on the slice of a number; returns its outputs.
_RunSlice = Callable[[int], list[mx.array]]


def scale_and_clip(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    search_steps: int,
    folder: Path,
    watch: Callable[[str], None],
    is_known: Callable[[str], bool] = lambda block: False,
) -> None:
    """Scale and clip the weights of a model's blocks, so that rounding them afterwards loses less of their outputs.

    Args:
        model: dense, in eval mode; weights and norms of its blocks are changed in place, with nearly the
            same outputs.
        plan: module path to setting; other layers are scaled if they belong to a group, and not rounded.
        tokens: (R, L) ids to calibrate on; the hidden states of one block on all of them are held in memory.
        search_steps: number of scales and limits to try for each group of layers.
        folder: for the inputs of a block and its modules; removed with all that lies in it.
        watch: called with the path of each finished block.
        is_known: takes the path of a block; sets the weights that an interrupted run found for it, if there are any.
    """
    modules = dict(model.named_modules())
    recipes: dict[Any, list[Group]] = {}
    for prefix, inputs in block_inputs(model, tokens, folder=folder):
        block = modules[prefix]
        settings = {path: plan[f"{prefix}.{path}"] for path in weighted(block) if f"{prefix}.{path}" in plan}
        if settings and inputs:
            scaling = _BlockScaling(block, settings, inputs, folder)
            groups = scaling.groups(recipes)
            if not is_known(prefix):
                scaling.learn(groups, search_steps)
        watch(prefix)


class _LayerInputs(NamedTuple):
    """What is held of a layer's inputs.

    Attributes:
        sizes: mean magnitude of each channel, (D,).
        samples: evenly spaced rows, (at most 512, D).
    """

    sizes: mx.array
    samples: mx.array

    @classmethod
    def of(cls, slices: Sequence["_LayerInputs"], counts: Sequence[int]) -> "_LayerInputs":
        """Return the inputs of slices with some numbers of rows together."""
        shares = [count / sum(counts) for count in counts]
        sizes = sum((one.sizes * share for one, share in zip(slices, shares, strict=True)), mx.array(0.0))
        return cls(sizes, mx.concatenate([one.samples for one in slices]))

    def divided(self, scales: mx.array) -> "_LayerInputs":
        """Return the inputs with each channel divided by a scale."""
        return _LayerInputs(self.sizes / scales, (self.samples / scales).astype(self.samples.dtype))


class _Collected:
    """Inputs of a layer, slice by slice.

    Args:
        num_slices: their number; the last one may have fewer rows than the others.
    """

    def __init__(self, num_slices: int) -> None:
        self._num_slices, self._stride = num_slices, 0
        self._slices: list[_LayerInputs] = []
        self._counts: list[int] = []

    def add(self, x: mx.array) -> None:
        """Add the inputs of a slice, (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        self._stride = self._stride or max(1, math.ceil(len(rows) * self._num_slices / _CLIPPING_ROWS))
        sizes = mx.abs(rows.astype(mx.float32)).mean(axis=0)
        one = _LayerInputs(sizes, mx.contiguous(rows[-sum(self._counts) % self._stride :: self._stride]))
        mx.eval(one)
        self._slices.append(one)
        self._counts.append(len(rows))

    def together(self) -> _LayerInputs:
        """Return the inputs of all slices."""
        return _LayerInputs.of(self._slices, self._counts)


class _BlockScaling:
    """The search for one block, with its inputs in a forward pass.

    Args:
        block: changed by `learn`.
        settings: of its layers that are quantized.
        inputs: positional and keyword arguments of the block for each slice of rows.
        folder: for files.
    """

    def __init__(
        self, block: nn.Module, settings: Mapping[str, Setting], inputs: Sequence[StoredTree], folder: Path
    ) -> None:
        self._block, self._settings, self._inputs, self._folder = block, settings, inputs, folder

    def run(self, number: int) -> list[mx.array]:
        """Return the block's outputs on a slice, in the dtype of its weights; in fp32 on a CPU."""
        return self._run_module(self._block, self._inputs, number)

    def _run_module(self, module: nn.Module, stored: Sequence[StoredTree], number: int) -> list[mx.array]:
        dtype = next(iter(weighted(self._block).values())).weight.dtype
        inputs, named = widened(cast_to(dtype, stored[number].read()))
        outputs = [value for _, value in tree_flatten(module(*inputs, **named))]
        mx.eval(outputs)
        return outputs

    def groups(self, recipes: dict[Any, list[Group]]) -> list[Group]:
        """Return the groups of the block's layers, found for the first block of its kind.

        Args:
            recipes: groups by kind of block; updated.
        """
        alike = tuple((path, type(one), one.weight.shape) for path, one in weighted(self._block).items())
        if alike not in recipes:
            run = partial(self.run, 0)
            recipes[alike] = find_groups(self._block, run, noted(self._block, run))
            mx.clear_cache()
        return recipes[alike]

    def learn(self, groups: Sequence[Group], search_steps: int) -> None:
        """Scale and clip the block; undo it if the quantization error is not reduced.

        Args:
            groups: of its layers.
            search_steps: number of scales and limits to try.
        """
        dense, reference = self._block.parameters(), self._stored_outputs(self.run, "outputs")
        unscaled = dict.fromkeys(self._settings, 1.0)
        before = self._lost(self.run, reference, unscaled)
        x, runs = self._noted_inputs(groups)
        for group in groups:
            rounded = [path for path in group.layers if path in self._settings]
            if rounded:
                scales = self._best_scales(rounded, x[group.layers[0]].sizes, runs[group], search_steps)
                apply_scales(self._block, group, scales)
                x |= {path: x[path].divided(scales) for path in group.layers}
        self._clip(x, search_steps)
        if not self._lost(self.run, reference, unscaled) < before:
            self._block.update(dense)
        mx.eval(self._block.parameters())
        mx.clear_cache()

    def _noted_inputs(self, groups: Sequence[Group]) -> tuple[dict[str, _LayerInputs], dict[Group, _RunSlice]]:
        """Return the inputs of layers, and what runs the smallest module that contains the layers of a group."""
        modules = dict(self._block.named_modules())
        paths = {*self._settings, *(path for group in groups for path in group.layers)}
        collected: dict[str, _Collected] = {}
        parts: dict[str, list[StoredTree]] = {}
        smallest: dict[Group, str] = {}
        for number in range(len(self._inputs)):
            calls = noted(self._block, partial(self.run, number))
            smallest = smallest or {group: _smallest_module(group.layers, calls) for group in groups}
            for path in paths & calls.keys():
                if _is_product(calls[path].x, modules[path].weight):
                    collected.setdefault(path, _Collected(len(self._inputs))).add(calls[path].x)
            self._store_calls({path: calls[path] for path in smallest.values() if path}, number, parts)
            del calls  # before those of the next slice
        runs: dict[Group, _RunSlice] = {
            group: partial(self._run_module, modules[path], parts[path]) if path else self.run
            for group, path in smallest.items()
        }
        return {path: one.together() for path, one in collected.items()}, runs

    def _store_calls(self, calls: Mapping[str, Noted], number: int, parts: dict[str, list[StoredTree]]) -> None:
        """Add the inputs of modules on the slice of a number to those on earlier slices."""
        for place, (path, call) in enumerate(calls.items()):
            file = self._folder / f"module-{place}-{number}.safetensors"
            parts.setdefault(path, []).append(StoredTree((call.inputs, call.named), file))

    def _stored_outputs(self, run: _RunSlice, name: str) -> list[StoredTree]:
        """Return the outputs on all slices, in files."""
        files = [self._folder / f"{name}-{number}.safetensors" for number in range(len(self._inputs))]
        return [StoredTree(run(number), file) for number, file in enumerate(files)]

    def _best_scales(self, paths: Sequence[str], sizes: mx.array, run: _RunSlice, search_steps: int) -> mx.array:
        """Return the scales, (D,), with the least quantization error of some outputs.

        The candidates are powers, from 0 to 1, of the mean magnitude of each channel.

        Args:
            paths: of the layers.
            sizes: mean magnitudes of their inputs, (D,).
            run: computes the outputs on a slice.
            search_steps: number of candidates.
        """
        reference = self._stored_outputs(run, "module-outputs")
        tried = []
        for step in range(search_steps):
            scales = mx.maximum(sizes ** (step / search_steps), _LEAST_SCALE)
            scales = scales / mx.sqrt(scales.max() * scales.min())
            tried.append((self._lost(run, reference, dict.fromkeys(paths, scales)), step, scales))
        return min(tried, key=lambda one: one[:2])[2]

    def _lost(self, run: _RunSlice, reference: Sequence[StoredTree], scales: Mapping[str, Any]) -> float:
        """Return the squared error of some outputs on all slices with some layers rounded under column scales."""
        layers = weighted(self._block)
        dense = {path: layers[path].weight for path in scales}
        for path, own in scales.items():
            rounded = round_trip((dense[path] * own).astype(dense[path].dtype), self._settings[path])
            layers[path].weight = (rounded / own).astype(rounded.dtype)
        try:
            lost = sum(_squared_error(run(number), exact.read()) for number, exact in enumerate(reference))
        finally:
            for path, weight in dense.items():
                layers[path].weight = weight
        return lost if math.isfinite(lost) else math.inf

    def _clip(self, x: Mapping[str, _LayerInputs], search_steps: int) -> None:
        """Clip the weights of the block's layers where that reduces the error of their products."""
        from mlx_lm.quant.awq import search_best_clip

        layers = weighted(self._block)
        for path, setting in self._settings.items():
            weight = layers[path].weight
            if path not in x or any(word in path.rpartition(".")[2] for word in _NOT_CLIPPED):
                continue
            clipped = search_best_clip(
                SimpleNamespace(weight=weight, input_feat=x[path].samples[None]),
                quantize_func=lambda part, setting=setting: round_trip(part, setting),
                group_size=setting.group_size,
                n_grid=search_steps,
            )
            layers[path].weight = clipped.astype(weight.dtype)


def _smallest_module(paths: Sequence[str], calls: Mapping[str, Noted]) -> str:
    """Return the path of the smallest module that contains some layers and was called once; empty for the block."""
    path = os.path.commonpath([one.replace(".", "/") for one in paths]).replace("/", ".")
    while path and path not in calls:
        path = path.rpartition(".")[0]
    return path


def _is_product(x: Any, weight: mx.array) -> bool:
    """Return whether a layer multiplies its input, x, (..., D), by a weight, (..., D)."""
    return isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating) and x.shape[-1] == weight.shape[-1]


def _squared_error(outputs: Iterable[mx.array], exact: Iterable[mx.array]) -> float:
    pairs = zip(outputs, exact, strict=True)
    return sum(float((one - other).astype(mx.float32).square().sum()) for one, other in pairs)
