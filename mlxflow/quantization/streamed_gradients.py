"""Gradients of a loss in the weights of a dense model, one row after the other, while memory holds one block.

As in gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) with blocks as segments: a forward pass writes the
input of each block into a file, a backward pass from the last block to the first reads them. The weights of a block are
read for each of the two. Layers outside of the blocks follow, one at a time.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.quantization.block_calls import blocks_answering, find_blocks
from mlxflow.quantization.hidden_streams import HiddenStreams
from mlxflow.quantization.layer_inputs import remove_weights

#: See `training.objective.Objective`: takes a model, tokens and marks, (B, L + 1) each; returns the sum of the losses
#: and the number of targets.
Objective = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]

#: Takes weights by module path; its block gets a function to call with the gradients of each row, by the same paths.
Part = Callable[[Mapping[str, mx.array]], AbstractContextManager[Callable[[Mapping[str, mx.array]], None]]]

_INPUTS, _GRADIENTS = "dense", "gradient"


class GradientRows(NamedTuple):
    """Rows of tokens and their loss.

    Attributes:
        tokens: (R, L + 1) ids.
        marks: (R, L + 1); see `data.token_file.Batch`.
        objective: the loss.
        folder: for files of R * L * D numbers for each block; removed afterwards.
    """

    tokens: mx.array
    marks: mx.array
    objective: Objective
    folder: Path

    def row(self, number: int) -> tuple[mx.array, mx.array]:
        """Return tokens and marks of a row, (1, L + 1) each."""
        return self.tokens[number : number + 1], self.marks[number : number + 1]


def visit_gradients(load: Callable[[], nn.Module], paths: Sequence[str], rows: GradientRows, *, part: Part) -> float:
    """Compute the gradient of each row's loss in some weights, and return the number of targets.

    A model whose blocks are unusual (see `block_calls.find_blocks`) is held as a whole.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own.
        paths: of the layers.
        rows: and their loss.
        part: called with the weights of a block, or of a layer outside of the blocks; gets the gradients of all rows.
    """
    model = load()
    found = find_blocks(model, context_length=rows.tokens.shape[1] - 1)
    if isinstance(found, str):
        return _visit_whole(model, paths, rows, part)
    try:
        streamed = _Streamed(load, [call.path for call in found.calls], rows)
        del model, found  # with the layers outside of the blocks, once these are read
        return streamed.visit(paths, part)
    finally:
        shutil.rmtree(rows.folder, ignore_errors=True)


def _visit_whole(model: nn.Module, paths: Sequence[str], rows: GradientRows, part: Part) -> float:
    modules = dict(model.named_modules())
    weights = {path: modules[path].weight for path in paths}

    def loss(weights: dict[str, mx.array], tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        for path, weight in weights.items():
            modules[path].weight = weight
        return rows.objective(model, tokens, marks)

    compiled = mx.compile(lambda *inputs: mx.value_and_grad(loss)(*inputs))
    count = 0.0
    with part(weights) as add:
        for number in range(len(rows.tokens)):
            (_, targets), gradients = compiled(dict(weights), *rows.row(number))
            mx.eval(targets, gradients)
            count += float(targets)
            add(gradients)
    return count


class _Streamed:
    """The passes over the blocks of a model.

    Args:
        load: see `visit_gradients`.
        blocks: their paths in the order of their calls.
        rows: and their loss.
    """

    def __init__(self, load: Callable[[], nn.Module], blocks: list[str], rows: GradientRows) -> None:
        num_rows, length = rows.tokens.shape
        self._load, self._blocks, self._rows = load, blocks, rows
        self._streams = HiddenStreams(rows.folder, key="", num_rows=num_rows, context_length=length - 1, at_once=1)

    def visit(self, paths: Sequence[str], part: Part) -> float:
        """See `visit_gradients`."""
        model = self._load()
        self._write_inputs(model)
        count = self._write_gradient_of_last(model)
        model = self._load()
        inside: set[str] = set()
        for number in reversed(range(len(self._blocks))):
            own = [path for path in paths if path.startswith(f"{self._blocks[number]}.")]
            inside.update(own)
            self._visit_block(model, number, own, part)
            if number + 1 < len(self._blocks):  # what the last block gives is read once more
                self._streams.remove_inputs(number + 1)
        del model
        for path in (path for path in paths if path not in inside):
            self._visit_outside(self._load(), path, part)
        return count

    def _arguments(self, model: nn.Module, number: int) -> tuple[mx.array, dict[str, tuple[Any, Any]]]:
        """Return what the first block takes for a row, (1, L, D), and what each block takes besides, lazy."""
        taken: dict[str, tuple[Any, Any]] = {}
        embedded: list[mx.array] = []

        def answer(path: str, x: mx.array, others: Any, named: Any) -> mx.array:
            if not taken:
                embedded.append(x)
            taken[path] = others, named
            return x

        with blocks_answering(model, answer):
            self._rows.objective(model, *self._rows.row(number))  # not evaluated
        return embedded[0], taken

    def _write_inputs(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        streams = self._streams
        streams.write(_INPUTS, 0, lambda row, _: _evaluated(self._arguments(model, row)[0]))
        for number, path in enumerate(self._blocks):
            block = modules[path]

            def outputs(row: int, _: int, *, number: int = number, path: str = path, block: Any = block) -> mx.array:
                others, named = self._arguments(model, row)[1][path]
                return _evaluated(block(streams.read(_INPUTS, number, [row]), *others, **named))

            streams.write(_INPUTS, number + 1, outputs)
            remove_weights(block)
            mx.clear_cache()

    def _write_gradient_of_last(self, model: nn.Module) -> float:
        """Write the gradients in the outputs of the last block, and return the number of targets."""
        last, count = len(self._blocks), 0.0

        def gradient(row: int, _: int) -> mx.array:
            nonlocal count

            def loss(hidden: mx.array) -> tuple[mx.array, mx.array]:
                with blocks_answering(model, lambda *_: hidden):
                    return self._rows.objective(model, *self._rows.row(row))

            outputs: tuple[Any, mx.array] = mx.value_and_grad(loss)(self._streams.read(_INPUTS, last, [row]))
            (_, targets), found = outputs
            mx.eval(targets, found)
            count += float(targets)
            return found

        self._streams.write(_GRADIENTS, last, gradient)
        return count

    def _visit_block(self, model: nn.Module, number: int, paths: Sequence[str], part: Part) -> None:
        """Give the gradients of a block's weights to a part, and write those in the block's inputs."""
        path, modules, streams = self._blocks[number], dict(model.named_modules()), self._streams
        weights = {path: modules[path].weight for path in paths}

        def gradient(row: int, _: int) -> mx.array:
            others, named = self._arguments(model, row)[1][path]

            def outputs(x: mx.array, *arrays: mx.array) -> mx.array:
                for own, array in zip(weights, arrays, strict=True):
                    modules[own].weight = array
                hidden: mx.array = modules[path](x, *others, **named)
                return hidden

            inputs = [streams.read(_INPUTS, number, [row]), *weights.values()]
            found: list[mx.array] = mx.vjp(outputs, inputs, [streams.read(_GRADIENTS, number + 1, [row])])[1]
            for own, weight in weights.items():
                modules[own].weight = weight
            mx.eval(found)
            add(dict(zip(weights, found[1:], strict=True)))
            return found[0]

        with part(weights) as add:
            streams.write(_GRADIENTS, number, gradient)
        remove_weights(modules[path])
        mx.clear_cache()

    def _visit_outside(self, model: nn.Module, path: str, part: Part) -> None:
        """Give the gradients of a layer outside of the blocks to a part: of its uses before and after them."""
        layer, last = dict(model.named_modules())[path], len(self._blocks)
        weight = layer.weight
        with part({path: weight}) as add:
            for row in range(self._streams.num_rows):
                hidden = self._streams.read(_INPUTS, last, [row])
                incoming = self._streams.read(_GRADIENTS, 0, [row])

                def loss(weight: mx.array, row: int, hidden: mx.array, incoming: mx.array) -> mx.array:
                    layer.weight = weight
                    embedded: list[mx.array] = []

                    def answer(_: str, x: mx.array, *__: Any) -> mx.array:
                        embedded.append(x)
                        return hidden

                    with blocks_answering(model, answer):
                        total, _ = self._rows.objective(model, *self._rows.row(row))
                    return total + (embedded[0] * incoming).astype(mx.float32).sum()

                gradient = mx.grad(loss)(weight, row, hidden, incoming)
                layer.weight = weight
                mx.eval(gradient)
                add({path: gradient})


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
