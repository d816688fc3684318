"""A model whose blocks are read from the disk when a forward pass needs them: memory holds one block, not the model.

The forward passes of several batches are built together, lazily, and then evaluated block by block: first the outputs
of the first block for all batches, then those of the second. The weights of a block are replaced by unread ones as soon
as all batches have passed it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.ops.patching import layer_method


class StreamedModel:
    """A model that drops the weights of each block after use.

    A model without a list of blocks keeps all its weights.

    Args:
        load: returns the model in eval mode, with lazy weights of its own; called again for each pass.

    Attributes:
        model: its weights outside of the blocks stay in memory once they are read.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self.model = load()
        self.model.eval()
        self._paths = _block_paths(self.model)
        self._unread: dict[str, dict[str, Any]] = {}

    @property
    def has_blocks(self) -> bool:
        """Whether the model has a list of blocks."""
        return bool(self._paths)

    @contextmanager
    def passes(self) -> Iterator[Callable[[], None]]:
        """Record the blocks of lazy forward passes; the function that is yielded evaluates them block by block.

        Call it after the forward passes, and before anything that depends on them is evaluated.
        """
        outputs: dict[str, list[Any]] = {path: [] for path in self._paths}
        modules = dict(self.model.named_modules())

        def recording(path: str) -> Callable[[Any], Any]:
            def make(call: Any) -> Any:
                def recorded_call(self: Any, *inputs: Any, **named: Any) -> Any:
                    output = call(self, *inputs, **named)
                    outputs[path].append([value for _, value in tree_flatten(output) if isinstance(value, mx.array)])
                    return output

                return recorded_call

            return make

        def evaluate() -> None:
            for path, found in outputs.items():
                for output in found:
                    mx.eval(output)
                found.clear()
                self._drop(path, modules[path])

        with ExitStack() as stack:
            for path in self._paths:
                stack.enter_context(layer_method(modules[path], "__call__", recording(path), by=__name__))
            try:
                yield evaluate
            finally:
                for found in outputs.values():
                    found.clear()  # see `layer_method`

    def logits(self, tokens: mx.array) -> mx.array:
        """Return the logits, (B, L, V), of token ids, (B, L), evaluated."""
        with self.passes() as evaluate:
            logits: mx.array = self.model(tokens)
            evaluate()
        mx.eval(logits)
        return logits

    def _drop(self, path: str, block: nn.Module) -> None:
        """Replace the weights of a block by unread ones."""
        if path not in self._unread:
            modules = dict(self._load().named_modules())
            self._unread = {one: modules[one].parameters() for one in self._paths}
        block.update(self._unread.pop(path))


def _block_paths(model: nn.Module) -> list[str]:
    """Return the paths of a model's blocks in their order, each once; none if it has no list of blocks."""
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not all(isinstance(block, nn.Module) for block in blocks):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    return list(dict.fromkeys(paths[id(block)] for block in blocks if id(block) in paths))
