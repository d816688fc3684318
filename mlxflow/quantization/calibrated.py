"""Calibrated quantization on rows of tokens: GPTQ and DWQ by mlx-lm's functions, and AWQ.

Each function returns the packed layers of a dense model and leaves the model dense. A setting that a method cannot
learn is refused by name; layers that it only rounds, such as embeddings, may have any setting.
"""

import copy
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlxflow.messages.errors import CallError
from mlxflow.quantization.codec import Packed, narrowed, pack
from mlxflow.quantization.mlx_lm_patches import (
    dense_products,
    following,
    numpy_random_kept,
    packed_layer,
    quiet,
)
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.progress import show_layers
from mlxflow.quantization.settings import Setting
from mlxflow.storage.host_arrays import numpy_of

#: Rows in a forward pass of the methods.
BATCH_SIZE = 4

_GPTQ_BITS = (2, 4, 8)

# Scales that AWQ tries, as in mlx-lm
_AWQ_STEPS = 20

_DWQ_LEARNING_RATE = 1e-5

_MORE_ROWS = "Calibrate on more rows (calibration_rows)."


def require_learnable(method: str, model: nn.Module, plan: Mapping[str, Setting], *, key: str) -> None:
    """Check that a method supports a plan, by shapes and classes only.

    Args:
        method: "gptq", "awq", "dwq", or one without calibration.
        model: dense; its weights need not be evaluated.
        plan: module path to setting.
        key: of the table with the settings, for messages.

    Raises:
        CallError: names the first layer that the method cannot learn.
    """
    name = _named(method, key)
    if method in ("gptq", "awq") and not plan.keys() & _inside_blocks(model):
        raise CallError(f"{name}: the plan has no layer that it could learn. Leave one of the blocks' to be quantized.")
    if method == "gptq":
        _check_gptq(model, plan, name)
    if method == "dwq":
        _check_trainable(plan, name)


def learn(
    method: str, model: nn.Module, plan: Mapping[str, Setting], tokens: mx.array, *, seed: int, key: str
) -> dict[str, Packed]:
    """Return the packed layers that a method learns, with its default hyperparameters.

    Args:
        method: "gptq", "awq" or "dwq".
        model: dense, in eval mode; see the function of the method.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on.
        seed: of the order of the rows.
        key: of the table with the settings, for messages.

    Raises:
        CallError: the method does not support the plan, or there are too few rows.
    """
    mx.eval(model.parameters(), tokens)
    packed = _learned(method, model, plan, tokens, seed=seed, key=key)
    return {path: narrowed(packed.pop(path), plan[path]) for path in list(packed)}


def _learned(
    method: str, model: nn.Module, plan: Mapping[str, Setting], tokens: mx.array, *, seed: int, key: str
) -> dict[str, Packed]:
    if method == "gptq":
        return gptq(model, plan, tokens[:, :-1], batch_size=BATCH_SIZE, key=key)
    if method == "awq":
        return awq(model, plan, tokens[:, :-1], search_steps=_AWQ_STEPS, key=key)
    return dwq(model, plan, tokens, batch_size=BATCH_SIZE, learning_rate=_DWQ_LEARNING_RATE, seed=seed, key=key)


def gptq(
    model: nn.Module, plan: Mapping[str, Setting], tokens: mx.array, *, batch_size: int, key: str
) -> dict[str, Packed]:
    """Return layers whose codes compensate each other's errors (GPTQ; Frantar et al. 2022, arXiv:2210.17323).

    Linear layers and experts are learned, each with its own setting. Layers outside of the blocks, such as the head,
    are rounded if GPTQ does not support their setting; embeddings are always rounded.

    Args:
        model: dense, evaluated, in eval mode; unchanged.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on.
        batch_size: rows in a forward pass.
        key: of the table with the settings, for messages.

    Raises:
        CallError: mlx-lm's function does not support the plan, cannot invert the Hessian of a layer, or returns codes
            that are not finite.
    """
    from mlx_lm.quant.gptq import gptq_quantize

    require_learnable("gptq", model, plan, key=key)
    packed: dict[str, Packed] = {}
    for setting, paths in _by_setting(model, plan).items():
        own = dict.fromkeys(paths, setting)
        with following(model, own, free=set(paths), hides=True), quiet():
            try:
                bits, group_size = setting.bits, setting.group_size
                gptq_quantize(model, tokens, bits, group_size, bits, group_size, batch_size)
            except (RuntimeError, ValueError) as error:
                if "cholesky" not in str(error).lower():
                    raise
                raise CallError(f"{_named('gptq', key)}: {error}. {_MORE_ROWS}") from error
            packed |= _packed_layers(model, own)
    _require_finite(packed, _named("gptq", key))
    layers = quantizable_layers(model)
    return packed | {path: pack(layers[path].weight, setting) for path, setting in plan.items() if path not in packed}


def awq(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    search_steps: int,
    key: str,
) -> dict[str, Packed]:
    """Return layers after activation-aware scaling and clipping (AWQ; Lin et al. 2023, arXiv:2306.00978).

    Layers of the blocks are learned, each with its own setting of any mode; embedding and head are rounded. Norms and
    dense weights of the model absorb the scales: save the changed model.

    Args:
        model: dense, evaluated, in eval mode; norms and weights of its blocks are changed in place.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on; the activations of a block on all of them are held in memory.
        search_steps: number of scales to try for each group of layers.
        key: of the table with the settings, for messages.

    Raises:
        CallError: the plan has no layer of the blocks.
    """
    from mlxflow.quantization.awq import scale_and_clip

    require_learnable("awq", model, plan, key=key)
    with show_layers(key, len(model.layers)) as watch:
        scale_and_clip(model, plan, tokens, search_steps=search_steps, watch=watch)
    layers = quantizable_layers(model)
    packed = {path: pack(layers[path].weight, setting) for path, setting in plan.items()}
    mx.eval(packed)
    return packed


def dwq(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    batch_size: int,
    learning_rate: float,
    seed: int,
    key: str,
) -> dict[str, Packed]:
    """Return layers whose scales and biases are trained to reproduce the dense model's logits (DWQ).

    Affine layers with less than 8 bits are trained for one pass over the rows; the others are rounded.

    Args:
        model: dense, evaluated, in eval mode; unchanged.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on; R at least twice the batch size; the last batch is for validation.
        batch_size: rows in a step.
        learning_rate: of Adam.
        seed: of the order of the rows.
        key: of the table with the settings, for messages.

    Raises:
        CallError: mlx-lm's function does not support the plan, or there are too few rows.
    """
    from mlx_lm.quant.dwq import dwq_quantize

    name = _named("dwq", key)
    require_learnable("dwq", model, plan, key=key)
    if len(tokens) < 2 * batch_size:
        raise CallError(
            f"{name}: needs {2 * batch_size} calibration rows, two batches, and has {len(tokens)}. "
            "Raise calibration_rows."
        )
    student = _rounded_copy(model, plan)
    dtype = next(layer.weight.dtype for path, layer in quantizable_layers(model).items() if path in plan)
    rows = [(row, 0) for row in numpy_of(tokens).tolist()]
    with numpy_random_kept(), dense_products(student), quiet():
        dwq_quantize(
            student,
            lambda batch, _, split: model(batch),
            optim.Adam(learning_rate=learning_rate, bias_correction=True),
            rows[:-batch_size],
            rows[-batch_size:],
            batch_size=batch_size,
            max_seq_length=tokens.shape[1],
            seed=seed,
            dtype=dtype,
        )
    return _packed_layers(student, plan)


def _rounded_copy(model: nn.Module, plan: Mapping[str, Setting]) -> nn.Module:
    """Return a frozen copy of a model with the layers of a plan rounded."""
    student = copy.deepcopy(model)
    layers = quantizable_layers(student)
    student.update_modules(tree_unflatten([(path, packed_layer(layers[path], plan[path])) for path in plan]))
    student.freeze()
    return student


def choose_rows(marks: Any, *, count: int, seed: int) -> Any:
    """Return the numbers of randomly chosen rows to calibrate on, rows without padding first.

    Args:
        marks: (R, L + 1), 0 for padding.
        count: of rows; fewer are returned if there are fewer.
        seed: of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(marks))
    padded = np.asarray([bool((marks[row] == 0).any()) for row in order[: 4 * count]])
    first = order[: 4 * count]
    return np.concatenate([first[~padded], first[padded]])[:count]


def _inside_blocks(model: nn.Module) -> set[str]:
    """Return the paths of all layers within the model's blocks; of all layers if the model has no list of blocks."""
    blocks = getattr(model, "layers", None)
    if not blocks:
        return set(quantizable_layers(model))
    ids = {id(module) for block in blocks for module in block.modules()}
    return {path for path, module in model.named_modules() if id(module) in ids}


def _by_setting(model: nn.Module, plan: Mapping[str, Setting]) -> dict[Setting, list[str]]:
    """Return the layers that GPTQ learns, by their settings."""
    from mlx_lm.models.switch_layers import SwitchLinear

    paths: dict[Setting, list[str]] = {}
    for path, layer in quantizable_layers(model).items():
        setting = plan.get(path)
        if (
            setting
            and type(layer) in (nn.Linear, SwitchLinear)
            and setting.mode == "affine"
            and setting.bits in _GPTQ_BITS
        ):
            paths.setdefault(setting, []).append(path)
    return paths


def _check_gptq(model: nn.Module, plan: Mapping[str, Setting], name: str) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    layers, inside = quantizable_layers(model), _inside_blocks(model)
    for path in (path for path in plan if path in inside and type(layers[path]) in (nn.Linear, SwitchLinear)):
        if plan[path].mode != "affine":
            raise CallError(f'{name}: learns affine layers, and {path} is {plan[path].mode}. Set mode = "affine".')
        if plan[path].bits not in _GPTQ_BITS:
            raise CallError(
                f"{name}: mlx-lm's GPTQ has 2, 4 and 8 bits, and {path} has {plan[path].bits}. Use one of them."
            )


def _check_trainable(plan: Mapping[str, Setting], name: str) -> None:
    for path, setting in plan.items():
        if setting.mode == "symmetric" and setting.bits < 8:
            raise CallError(
                f"{name}: trains scales and biases apart, which moves the fixed zero point of {path}. "
                'Set mode = "affine", or use method = "qat".'
            )
    if not any(setting.mode == "affine" and setting.bits < 8 for setting in plan.values()):
        raise CallError(f"{name}: trains affine layers under 8 bits, and the plan has none. Use fewer bits.")


def _named(method: str, key: str) -> str:
    return f'{key}.method = "{method}"'


def _require_finite(packed: Mapping[str, Packed], name: str) -> None:
    for path, parts in packed.items():
        if not all(mx.isfinite(part).all().item() for part in (parts.scales, parts.biases) if part is not None):
            raise CallError(f"{name}: {path} has scales or biases that are not finite. {_MORE_ROWS}")


def _packed_layers(model: nn.Module, plan: Mapping[str, Setting]) -> dict[str, Packed]:
    modules = dict(model.named_modules())
    packed = {path: Packed(modules[path].weight, modules[path].scales, modules[path].get("biases")) for path in plan}
    mx.eval(packed)
    return packed
