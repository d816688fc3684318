"""`method = "block"`: each block in turn learns to give the dense model's hidden states.

The weights of a block are first rounded so that later columns compensate the errors of earlier ones
(`error_compensation`), then trained together with their grids (`block_training`). Memory holds one block; hidden states
lie in files (`hidden_streams`). The layers outside of the blocks, embedding and head, are only compensated, before them
(`outside_layers`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.messages.errors import CallError
from mlxflow.models.fp32_on_cpu import widened
from mlxflow.quantization.block_calls import BlockCall, RecordedPass, record_blocks
from mlxflow.quantization.block_training import BlockRows, relative_error, train_block
from mlxflow.quantization.codec import Packed, unpack
from mlxflow.quantization.error_compensation import Compensations
from mlxflow.quantization.grids import first_grid, nearest
from mlxflow.quantization.hidden_streams import HiddenStreams
from mlxflow.quantization.layer_inputs import input_products, other_weights, remove_weights
from mlxflow.quantization.outside_layers import round_outside
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.trained_grid import GridLayer, Trained
from mlxflow.storage.host_arrays import numpy_of

#: Tokens in an update. Below: in a forward pass without gradients
TOKENS_PER_STEP, _TOKENS_AT_ONCE = 2048, 4096

# Tokens on which the inputs of the head are measured
_HEAD_TOKENS = 4096


class BlockRequest(NamedTuple):
    """The request for block-wise reconstruction.

    Attributes:
        num_steps: updates of each block; 0 for compensation only.
        seed: of the order of the rows.
        folder: for the files of a run that can be resumed.
        identity: of everything else that these files depend on.
        name: of the setting, for messages.
    """

    num_steps: int
    seed: int
    folder: Path
    identity: str
    name: str


class BlockErrors(NamedTuple):
    """How well a block gives the dense model's hidden states, as `relative_error` says it.

    Attributes:
        path: of the block.
        before: in the first steps of training; 0 without training.
        after: in the last steps.
        output: on all rows, with the stored weights.
    """

    path: str
    before: float
    after: float
    output: float


class LearnedBlocks(NamedTuple):
    """The result: codes by module path, and the errors of the blocks in their order."""

    packed: dict[str, Packed]
    errors: list[BlockErrors]


def require_blocks(model: nn.Module, plan: Mapping[str, Setting], *, context_length: int, name: str) -> RecordedPass:
    """Return how to call the blocks of a model, after checking that the method supports it; computes nothing.

    Args:
        model: dense; its weights may be lazy.
        plan: module path to setting.
        context_length: positions of a row.
        name: of the setting, for messages.

    Raises:
        CallError: the blocks take unusual inputs, or none of their layers is quantized.
    """
    recorded = record_blocks(model, context_length=context_length, name=name)
    inside = [path for call in recorded.calls for path in _layers_of(call, plan)]
    if not inside:
        raise CallError(f"{name}: the plan has no layer that it could learn. Leave one of the blocks' to be quantized.")
    return recorded


def learn_blocks(
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    tokens: NDArray[Any],
    request: BlockRequest,
    *,
    watch: Callable[[BlockErrors], None],
) -> LearnedBlocks:
    """Return the packed layers of a plan.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own; those of a finished block are removed.
        plan: module path to setting.
        tokens: (R, L) ids to calibrate on.
        request: steps, and the folder of an interrupted run.
        watch: called with the errors of each finished block, also of an earlier run.

    Raises:
        CallError: see `require_blocks`.
    """
    num_rows, length = tokens.shape
    model = load()
    recorded = require_blocks(model, plan, context_length=length, name=request.name)
    inside = {path for call in recorded.calls for path in _layers_of(call, plan)}
    rest = {path: setting for path, setting in plan.items() if path not in inside}
    outside = round_outside(load, rest, tokens[: max(1, _HEAD_TOKENS // length)], name=request.name)
    streams = HiddenStreams(
        request.folder,
        key=request.identity,
        num_rows=num_rows,
        context_length=length,
        at_once=max(1, _TOKENS_AT_ONCE // length),
    )
    work = _BlockWork(model, plan, request, streams)
    errors = []
    first = streams.next_block
    if not first:
        work.write_inputs(recorded, tokens, outside)
    packed = {path: codes for path, (codes, _) in outside.items()}
    del outside  # and with it the rounded weights of embedding and head
    for path in packed:
        _module(model, path).pop("weight")
    mx.clear_cache()
    for number, call in enumerate(recorded.calls):
        if number >= first:
            work.learn(number, call)
        remove_weights(_module(model, call.path))
        errors.append(BlockErrors(call.path, *streams.finished(number).errors))
        watch(errors[-1])
    for number in range(len(recorded.calls)):
        packed |= streams.finished(number).packed
    return LearnedBlocks(packed, errors)


class _BlockWork:
    """The work on one block after the other."""

    def __init__(
        self, model: nn.Module, plan: Mapping[str, Setting], request: BlockRequest, streams: HiddenStreams
    ) -> None:
        self._model, self._plan, self._request, self._streams = model, plan, request, streams

    def write_inputs(
        self, recorded: RecordedPass, tokens: NDArray[Any], outside: Mapping[str, tuple[Packed, mx.array]]
    ) -> None:
        """Write the inputs of the first block, dense and with the layers outside of the blocks rounded."""
        ids = mx.array(tokens.astype(np.int32))

        def part(begin: int, end: int) -> mx.array:
            hidden: mx.array = widened(recorded.embed(ids[begin:end]))
            mx.eval(hidden)
            return hidden

        self._streams.write("dense", 0, part)
        with other_weights(self._model, {path: weight for path, (_, weight) in outside.items()}):
            self._streams.write("quantized", 0, part)

    def learn(self, number: int, call: BlockCall) -> None:
        """Learn one block, and write its codes and the inputs of the next one."""
        streams, block = self._streams, _module(self._model, call.path)
        stored = {path: layer.weight.dtype for path, layer in quantizable_layers(block).items()}
        block.update(widened(block.parameters()))
        mx.eval(block.parameters())
        settings = {path.removeprefix(f"{call.path}."): self._plan[path] for path in _layers_of(call, self._plan)}

        def run(kind: str) -> Callable[[int, int], mx.array]:
            def part(begin: int, end: int) -> mx.array:
                hidden = call(block, streams.read(kind, number, range(begin, end)))
                mx.eval(hidden)
                return hidden

            return part

        streams.write("dense", number + 1, run("dense"))
        layers, arrays = self._begin(block, settings, stored, run("quantized"))
        trained = train_block(
            block,
            call.__call__,
            layers,
            arrays,
            BlockRows(
                streams.num_rows,
                lambda rows: (streams.read("quantized", number, rows), streams.read("dense", number + 1, rows)),
            ),
            num_steps=self._request.num_steps,
            batch_size=max(1, min(streams.num_rows, TOKENS_PER_STEP // streams.context_length)),
            seed=self._request.seed + number,
        )
        packed = {path: layer.packed(trained.trained.pop(path)) for path, layer in layers.items()}
        mx.eval(packed)
        weights = {path: unpack(packed[path], settings[path], layers[path].dtype) for path in packed}
        with other_weights(block, weights):
            streams.write("quantized", number + 1, run("quantized"))
        output = self._error(number + 1)
        whole = {f"{call.path}.{path}": codes for path, codes in packed.items()}
        streams.finish(number, whole, (trained.first_error, trained.last_error, output))
        mx.clear_cache()

    def _begin(
        self,
        block: nn.Module,
        settings: Mapping[str, Setting],
        stored: Mapping[str, mx.Dtype],
        run: Callable[[int, int], mx.array],
    ) -> tuple[dict[str, GridLayer], dict[str, Trained]]:
        """Return the layers of a block, compensated, and their arrays to train.

        Args:
            block: dense.
            settings: of its layers, by path within the block.
            stored: dtypes of the stored weights, by the same paths.
            run: computes the block on consecutive rows.
        """
        modules = dict(block.named_modules())
        layers: dict[str, GridLayer] = {}
        arrays: dict[str, Trained] = {}
        products = input_products(block, list(settings), run, self._streams.spans())
        compensations = Compensations(
            {path: one for path, one in products.items() if one.shape[-1] == modules[path].weight.shape[-1]}
        )
        del products
        for path, setting in settings.items():
            weight = modules[path].weight
            grid = first_grid(weight, setting)
            mx.eval(grid)
            if (compensation := compensations.take(path)) is not None:
                numbers = [one.astype(mx.float32) for one in (weight, grid)]
                views = (numpy_of(one, copy=False) for one in numbers)
                weight = mx.array(compensation.applied(*views, nearest=nearest(setting)))
                del compensation, numbers  # before the next layer has its own
            dtypes = modules[path].weight.dtype, stored[path]
            layers[path], arrays[path] = GridLayer.begin(weight, setting, grid, dtypes=dtypes)
            mx.eval(arrays[path])
        return layers, arrays

    def _error(self, number: int) -> float:
        """Return the relative squared error of the inputs of a block, mean over all rows."""
        total = 0.0
        for begin, end in self._streams.spans():
            rows = range(begin, end)
            hidden, exact = (self._streams.read(kind, number, rows) for kind in ("quantized", "dense"))
            total += float(relative_error(hidden, exact)) * (end - begin)
        return total / self._streams.num_rows


def _layers_of(call: BlockCall, plan: Mapping[str, Setting]) -> list[str]:
    return [path for path in plan if path.startswith(f"{call.path}.")]


def _module(model: nn.Module, path: str) -> nn.Module:
    module: nn.Module = dict(model.named_modules())[path]
    return module
