"""Call a model's transformer blocks one by one, outside of a forward pass of the whole model.

What a block takes besides hidden states (masks, offsets, caches) is recorded in a forward pass of the whole model that
computes nothing: arrays are lazy, and only masks are evaluated. It must not depend on the tokens, and each block must
take the output of the one before it; other architectures are refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.messages.errors import CallError
from mlxflow.ops.patching import layer_method


class BlockCall(NamedTuple):
    """A block of a model, and what it takes besides hidden states.

    Attributes:
        path: of the block in the model.
        others: positional arguments after the hidden states.
        named: keyword arguments.
    """

    path: str
    others: tuple[Any, ...]
    named: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: mx.array) -> mx.array:
        """Return the output of a block, (B, L, D), of hidden states, (B, L, D)."""
        output: mx.array = block(hidden, *self.others, **self.named)
        return output


class _Recorded(NamedTuple):
    path: str
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


class RecordedPass(NamedTuple):
    """The blocks of a model in the order of their calls, and the input of the first.

    Attributes:
        calls: of the blocks.
        embed: returns the hidden states, (B, L, D), that the first block takes for token ids, (B, L).
    """

    calls: list[BlockCall]
    embed: Callable[[mx.array], mx.array]


def record_blocks(model: nn.Module, *, context_length: int, name: str) -> RecordedPass:
    """Return the blocks of a model and how to call each; no block is computed.

    Args:
        model: in eval mode; its weights may be lazy.
        context_length: positions of a row, L: masks have their shape.
        name: of the setting that needs it, for messages.

    Raises:
        CallError: the blocks take unusual inputs; names the first such block.
    """
    found = find_blocks(model, context_length=context_length)
    if isinstance(found, str):
        need = "needs blocks that each take only the output of the one before"
        raise CallError(f'{name}: {need}, and {kind_of_model(model)} has {found}. Use "gptq".')
    return found


def find_blocks(model: nn.Module, *, context_length: int) -> RecordedPass | str:
    """Return the blocks of a model and how to call each, or what is unusual about them, in words; see `record_blocks`.

    Args:
        model: in eval mode; its weights may be lazy.
        context_length: positions of a row, L.
    """
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        return "no list of blocks"
    passes = [_recorded(model, blocks, mx.full((1, context_length), token, mx.int32)) for token in (0, 1)]
    if problem := _problem(blocks, passes):
        return problem
    first = blocks[0]

    def embed(tokens: mx.array) -> mx.array:
        hidden: mx.array = _recorded(model, [first], tokens)[0].inputs[0]
        return hidden

    return RecordedPass([BlockCall(one.path, one.inputs[1:], one.named) for one in passes[0]], embed)


def kind_of_model(model: nn.Module) -> str:
    """Return the name of a model's architecture."""
    return type(model).__module__.rpartition(".")[2]


def after_blocks(model: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Return the lazy logits of a model, (B, L, V), whose blocks are left out.

    Args:
        model: its blocks need no weights.
        hidden: outputs of the last one, (B, L, D).
        tokens: (B, L) ids.
    """
    with blocks_answering(model, lambda *_: hidden):
        logits: mx.array = model(tokens)
    return logits


@contextmanager
def blocks_answering(
    model: nn.Module, answer: Callable[[str, mx.array, tuple[Any, ...], dict[str, Any]], mx.array]
) -> Iterator[None]:
    """Let a function answer for the blocks of a model until the block ends; they need no weights.

    Args:
        model: its blocks are usual, see `find_blocks`.
        answer: takes the path of a block, hidden states, and its other positional and keyword arguments.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    held = [answer]  # emptied at the end: the replaced classes are in a reference cycle, see `layer_method`

    def answering(path: str) -> Callable[[Any], Any]:
        return lambda _: lambda self, x, *others, **named: held[0](path, x, others, named)

    try:
        with ExitStack() as stack:
            for block in model.layers:
                stack.enter_context(layer_method(block, "__call__", answering(paths[id(block)]), by=__name__))
            yield
    finally:
        held.clear()


def _recorded(model: nn.Module, blocks: list[nn.Module], tokens: mx.array) -> list[_Recorded]:
    """Return the calls of some blocks in a forward pass that is not evaluated."""
    paths = {id(module): path for path, module in model.named_modules()}
    recorded: list[_Recorded] = []

    def recording(path: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def recorded_call(self: Any, *inputs: Any, **named: Any) -> Any:
                output = call(self, *inputs, **named)
                recorded.append(_Recorded(path, inputs, named, output))
                return output

            return recorded_call

        return make

    with ExitStack() as stack:
        for block in {id(block): block for block in blocks}.values():
            stack.enter_context(layer_method(block, "__call__", recording(paths[id(block)]), by=__name__))
        model(tokens)
    found = list(recorded)
    recorded.clear()  # see `layer_method`
    return found


def _problem(blocks: list[nn.Module], passes: list[list[_Recorded]]) -> str:
    """Return what is unusual about the calls of the blocks, in words; empty if nothing is."""
    calls, others = passes
    if len(calls) != len(blocks) or len({one.path for one in calls}) != len(blocks):
        return "blocks that are called more than once, or not at all"
    for place, (one, other) in enumerate(zip(calls, others, strict=True)):
        hidden = one.inputs[0] if one.inputs else None
        if not isinstance(hidden, mx.array) or hidden.ndim != 3:
            return f"{one.path}, whose first argument is not an array of hidden states"
        if not isinstance(one.output, mx.array) or one.output.shape != hidden.shape:
            return f"{one.path}, which returns other things than hidden states"
        if place and hidden is not calls[place - 1].output:
            return f"{one.path}, whose input is not the output of {calls[place - 1].path}"
        if not _are_equal((one.inputs[1:], one.named), (other.inputs[1:], other.named)):
            return f"{one.path}, whose further inputs depend on the tokens"
    return ""


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two trees of arguments have equal arrays."""
    first, second = (
        [(path, value) for path, value in tree_flatten(tree) if isinstance(value, mx.array)] for tree in (one, other)
    )
    return len(first) == len(second) and all(
        path == name and value.shape == array.shape and value.dtype == array.dtype and bool((value == array).all())
        for (path, value), (name, array) in zip(first, second, strict=True)
    )
