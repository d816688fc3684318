"""Round the layers outside of the blocks, embedding and head, so that the logits change least.

The head is compensated for its inputs, the dense model's last hidden states. An embedding that is also the head is
compensated for both uses: lookups take every column alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.models.fp32_on_cpu import widened
from mlxflow.quantization.block_calls import after_blocks, record_blocks
from mlxflow.quantization.codec import Packed, unpack
from mlxflow.quantization.error_compensation import Compensation
from mlxflow.quantization.grids import first_grid, nearest, pack_on
from mlxflow.quantization.layer_inputs import input_products, remove_weights
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.storage.host_arrays import numpy_of

# Weight of the lookups of an embedding that is also the head, relative to the mean over its columns as a head
_LOOKUPS = 1.0

# Numbers of a matrix that are rounded at a time: intermediate results of the search for grids are ten times as large
_NUMBERS_AT_ONCE = 1 << 24


def round_outside(
    load: Callable[[], nn.Module], plan: Mapping[str, Setting], tokens: NDArray[Any], *, name: str
) -> dict[str, tuple[Packed, mx.array]]:
    """Return the codes of the layers outside of the blocks, and their lazy rounded weights, by module path.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own.
        plan: of these layers, module path to setting.
        tokens: (R, L) ids on which the inputs of the head are measured.
        name: of the setting, for messages.
    """
    model = load()
    products = _head_inputs(model, list(plan), tokens, name=name)
    layers = quantizable_layers(model)
    rounded = {}
    for path, setting in plan.items():
        weight, inputs = layers[path].weight, products.pop(path, None)
        if inputs is None or inputs.shape[-1] != weight.shape[-1]:
            packed = _packed(weight, setting, None)
        else:
            if hasattr(layers[path], "as_linear"):
                inputs = inputs + mx.eye(len(inputs)) * (_LOOKUPS * mx.diag(inputs).mean())
            packed = _packed(weight, setting, Compensation(numpy_of(inputs, copy=False)))
        mx.eval(packed)
        rounded[path] = packed, unpack(packed, setting, weight.dtype)
    return rounded


def _packed(weight: mx.array, setting: Setting, compensation: Compensation | None) -> Packed:
    """Return the codes of a matrix on its best grid, compensated or not; some rows at a time."""
    parts = []
    step = max(1, _NUMBERS_AT_ONCE // weight.shape[-1])
    for begin in range(0, len(weight), step):
        rows = weight[begin : begin + step]
        grid = first_grid(rows, setting)
        exact = rows
        if compensation is not None:
            numbers = (numpy_of(one.astype(mx.float32)) for one in (rows, grid))
            exact = mx.array(compensation.applied(*numbers, nearest=nearest(setting)))
        parts.append(pack_on(exact, setting, grid))
        mx.eval(parts[-1])
    codes, scales, biases = (
        None if part[0] is None else mx.concatenate(list(part)) for part in zip(*parts, strict=True)
    )
    return Packed(codes, scales, biases)  # type: ignore[arg-type]


def _head_inputs(model: nn.Module, paths: list[str], tokens: NDArray[Any], *, name: str) -> dict[str, mx.array]:
    """Return the products of the inputs of layers after the blocks; the blocks lose their weights one by one."""
    recorded = record_blocks(model, context_length=tokens.shape[1], name=name)
    hidden = widened(recorded.embed(mx.array(tokens.astype(np.int32))))
    modules = dict(model.named_modules())
    for call in recorded.calls:
        block = modules[call.path]
        block.update(widened(block.parameters()))
        hidden = mx.concatenate([call(block, hidden[row : row + 1]) for row in range(len(hidden))])
        mx.eval(hidden)
        remove_weights(block)

    def tail(begin: int, end: int) -> mx.array:  # not evaluated: only the inputs of the layers are
        return after_blocks(model, hidden[begin:end], mx.array(tokens[begin:end].astype(np.int32)))

    return input_products(model, paths, tail, [(row, row + 1) for row in range(len(hidden))])
