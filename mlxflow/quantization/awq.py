"""AWQ: search the scales and clipping limits with the least quantization error of a block's output.

Lin et al. 2023 (arXiv:2306.00978). The search for scales follows mlx-lm's `awq` and measures the error at the output
of the smallest module that contains the layers; the search for limits is mlx-lm's function. mlx-lm has a table of
architectures. Here the layers that share scales are found by running the block (`scale_groups`), and blocks run inside
a forward pass of the whole model, with the inputs, masks and positions of the architecture.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.ops.patching import layer_method
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.scale_groups import Group, Noted, Run, apply_scales, cast_to, find_groups, noted, weighted
from mlxflow.quantization.settings import Setting

# Names of layers whose weights are not clipped, as in AWQ: queries and keys need their outliers
_NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv", "c_attn", "kv_a", "kv_b", "embed_q")

_LEAST_SCALE = 1e-4


def scale_and_clip(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    search_steps: int,
    watch: Callable[[str], None],
) -> None:
    """Scale and clip the weights of a model's blocks, so that rounding them afterwards loses less of their outputs.

    Args:
        model: dense, in eval mode; weights and norms of its blocks are changed in place, with nearly the
            same outputs.
        plan: module path to setting; other layers are scaled if they belong to a group, and not rounded.
        tokens: (R, L) ids to calibrate on; the activations of a block on all of them are held in memory.
        search_steps: number of scales and limits to try for each group of layers.
        watch: called with the path of each finished block.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    recipes: dict[Any, list[Group]] = {}

    def learning(block: nn.Module) -> Callable[[Any], Any]:
        prefix = paths[id(block)]
        settings = {path: plan[f"{prefix}.{path}"] for path in weighted(block) if f"{prefix}.{path}" in plan}
        waiting = [block] if settings else []  # a block may be called more than once

        def make(call: Any) -> Any:
            def learned_call(self: Any, *inputs: Any, **named: Any) -> Any:
                outputs = call(self, *inputs, **named)
                mx.eval(outputs)
                if waiting:
                    _BlockScaling(waiting.pop(), settings, call, inputs, named).learn(recipes, search_steps)
                    watch(prefix)
                return outputs

            return learned_call

        return make

    with ExitStack() as stack:
        for block in {id(block): block for block in model.layers}.values():
            stack.enter_context(layer_method(block, "__call__", learning(block), by=__name__))
        mx.eval(model(tokens))


class _BlockScaling:
    """The search for one block, with its inputs in a forward pass.

    Args:
        block: changed by `learn`.
        settings: of its layers that are quantized.
        call: the block's `__call__`: takes it and its inputs.
        inputs: positional arguments of `call`.
        named: keyword arguments of `call`.
    """

    def __init__(
        self,
        block: nn.Module,
        settings: Mapping[str, Setting],
        call: Callable[..., Any],
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        self._block, self._settings, self._call = block, settings, call
        self._inputs = (inputs, dict(named))

    def run(self) -> list[mx.array]:
        """Return the block's outputs, in the dtype of its weights."""
        return self._compute(lambda *inputs, **named: self._call(self._block, *inputs, **named), *self._inputs)

    def _compute(self, call: Callable[..., Any], inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[mx.array]:
        dtype = next(iter(weighted(self._block).values())).weight.dtype
        inputs, named = cast_to(dtype, (inputs, dict(named)))
        outputs = [value for _, value in tree_flatten(call(*inputs, **named))]
        mx.eval(outputs)
        return outputs

    def _run_of(self, paths: Sequence[str], calls: Mapping[str, Noted]) -> Run:
        """Return a function that runs the smallest module that contains some layers and was called once."""
        modules = dict(self._block.named_modules())
        path = os.path.commonpath([one.replace(".", "/") for one in paths]).replace("/", ".")
        while path and path not in calls:
            path = path.rpartition(".")[0]
        return partial(self._compute, modules[path], calls[path].inputs, calls[path].named) if path else self.run

    def learn(self, recipes: dict[Any, list[Group]], search_steps: int) -> None:
        """Scale and clip the block; undo it if the quantization error is not reduced.

        Args:
            recipes: groups of layers by kind of block; updated.
            search_steps: number of scales and limits to try.
        """
        calls = noted(self._block, self.run)
        alike = tuple((path, type(one), one.weight.shape) for path, one in weighted(self._block).items())
        if alike not in recipes:
            recipes[alike] = find_groups(self._block, self.run, calls)
        dense, reference = self._block.parameters(), self.run()
        unscaled = dict.fromkeys(self._settings, 1.0)
        before = self._lost(self.run, reference, unscaled)
        x = {path: one.x for path, one in calls.items()}
        for group in recipes[alike]:
            rounded = [path for path in group.layers if path in self._settings]
            if rounded:
                scales = self._best_scales(rounded, x[group.layers[0]], self._run_of(group.layers, calls), search_steps)
                apply_scales(self._block, group, scales)
                x |= {path: (x[path] / scales).astype(x[path].dtype) for path in group.layers}
        self._clip(x, search_steps)
        if not self._lost(self.run, reference, unscaled) < before:
            self._block.update(dense)
        mx.eval(self._block.parameters())
        mx.clear_cache()

    def _best_scales(self, paths: Sequence[str], x: mx.array, run: Run, search_steps: int) -> mx.array:
        """Return the scales, (D,), with the least quantization error of some outputs.

        The candidates are powers, from 0 to 1, of the mean magnitude of each channel.

        Args:
            paths: of the layers.
            x: their input, (..., D).
            run: computes the outputs.
            search_steps: number of candidates.
        """
        reference = run()
        sizes = mx.abs(x.reshape(-1, x.shape[-1]).astype(mx.float32)).mean(axis=0)
        tried = []
        for step in range(search_steps):
            scales = mx.maximum(sizes ** (step / search_steps), _LEAST_SCALE)
            scales = scales / mx.sqrt(scales.max() * scales.min())
            tried.append((self._lost(run, reference, dict.fromkeys(paths, scales)), step, scales))
        return min(tried, key=lambda one: one[:2])[2]

    def _lost(self, run: Run, reference: Sequence[mx.array], scales: Mapping[str, Any]) -> float:
        """Return the squared error of some outputs with some layers rounded under column scales."""
        layers = weighted(self._block)
        dense = {path: layers[path].weight for path in scales}
        for path, own in scales.items():
            rounded = round_trip((dense[path] * own).astype(dense[path].dtype), self._settings[path])
            layers[path].weight = (rounded / own).astype(rounded.dtype)
        try:
            outputs = run()
        finally:
            for path, weight in dense.items():
                layers[path].weight = weight
        pairs = zip(outputs, reference, strict=True)
        lost = sum(float((one - other).astype(mx.float32).square().sum()) for one, other in pairs)
        return lost if math.isfinite(lost) else math.inf

    def _clip(self, x: Mapping[str, mx.array], search_steps: int) -> None:
        """Clip the weights of the block's layers where that reduces the error of their products."""
        from mlx_lm.quant.awq import search_best_clip

        layers = weighted(self._block)
        for path, setting in self._settings.items():
            weight = layers[path].weight
            is_product = path in x and x[path].shape[-1] == weight.shape[-1]
            if not is_product or any(word in path.rpartition(".")[2] for word in _NOT_CLIPPED):
                continue
            rows = SimpleNamespace(weight=weight, input_feat=x[path].reshape(1, -1, weight.shape[-1]))
            clipped = search_best_clip(
                rows,
                quantize_func=lambda part, setting=setting: round_trip(part, setting),
                group_size=setting.group_size,
                n_grid=search_steps,
            )
            layers[path].weight = clipped.astype(weight.dtype)
