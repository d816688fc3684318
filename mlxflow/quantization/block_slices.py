"""The inputs of each block of a model, slice by slice of rows, in files: for blocks of any architecture.

The forward passes of all slices are built together, lazily, and evaluated block by block, as in
`evaluation.streamed_model`. As soon as the outputs of a block on a slice are there, its inputs are written into a file,
so that memory holds the hidden states of all rows once, whatever else a block takes. On a CPU they are in fp32.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxflow.models.fp32_on_cpu import widened
from mlxflow.ops.patching import layer_method

#: Tokens of a slice; it has at least one row.
TOKENS_AT_ONCE = 2048


class StoredTree:
    """A tree of values whose arrays lie in a file.

    Args:
        tree: of lists, tuples and dictionaries.
        file: is written, or replaced.
    """

    def __init__(self, tree: Any, file: Path) -> None:
        arrays: dict[str, mx.array] = {}

        def written(value: Any) -> Any:
            if not isinstance(value, mx.array):
                return value
            name = str(len(arrays))
            arrays[name] = value
            return _Unread(name)

        self._tree, self._file = tree_map(written, tree), file
        mx.save_safetensors(str(file), arrays)

    def read(self) -> Any:
        """Return the tree with its arrays, evaluated."""
        arrays: dict[str, mx.array] = mx.load(str(self._file))  # type: ignore[assignment]
        mx.eval(arrays)
        return tree_map(lambda value: arrays[value.name] if isinstance(value, _Unread) else value, self._tree)


class _Unread:
    """The place of an array in a tree, by its name in the file."""

    def __init__(self, name: str) -> None:
        self.name = name


class _LazyCall(NamedTuple):
    """A call of a block that is not evaluated: positional and keyword arguments, and the arrays that it returns."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: list[mx.array]


def block_inputs(model: nn.Module, tokens: mx.array, *, folder: Path) -> Iterator[tuple[str, list[StoredTree]]]:
    """Yield the path of each block of a model, and for each slice of rows its positional and keyword arguments.

    They are those of the model as it is before the first block is yielded; a block may be changed once it is. Of a
    block that is called more than once, they are those of its first call; a block that is not called has none.

    Args:
        model: in eval mode; weights may be lazy.
        tokens: (R, L) ids.
        folder: for the files; it is removed with all that lies in it before the next block is yielded.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    blocks = {paths[id(block)]: block for block in model.layers}
    calls = _lazy_calls(model, blocks, tokens)
    for path in blocks:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield path, list(_stored(calls.pop(path), folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stored(calls: list[_LazyCall], folder: Path) -> Iterator[StoredTree]:
    """Yield the inputs of a block's calls, which are evaluated and removed one by one."""
    calls.reverse()
    number = 0
    while calls:
        call = calls.pop()
        mx.eval(call.outputs)
        yield StoredTree(call.inputs, folder / f"inputs-{number}.safetensors")
        number += 1


def _lazy_calls(model: nn.Module, blocks: Mapping[str, nn.Module], tokens: mx.array) -> dict[str, list[_LazyCall]]:
    """Return the first call of each block in the forward pass of each slice of rows."""
    slices: list[dict[str, _LazyCall]] = []

    def recording(path: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def recorded_call(self: Any, *inputs: Any, **named: Any) -> Any:
                inputs, named = widened((inputs, named))
                output = call(self, *inputs, **named)
                arrays = [value for _, value in tree_flatten(output) if isinstance(value, mx.array)]
                slices[-1].setdefault(path, _LazyCall((inputs, named), arrays))
                return output

            return recorded_call

        return make

    num_rows, length = tokens.shape
    size = max(1, TOKENS_AT_ONCE // length)
    with ExitStack() as stack:
        for path, block in blocks.items():
            stack.enter_context(layer_method(block, "__call__", recording(path), by=__name__))
        for begin in range(0, num_rows, size):
            slices.append({})
            model(tokens[begin : begin + size])
    found = {path: [one[path] for one in slices if path in one] for path in blocks}
    slices.clear()  # see `layer_method`
    return found
