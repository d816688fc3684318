"""Codes learned from text, on a plan and on rows of tokens: GPTQ and DWQ by mlx-lm's functions, AWQ by its search.

Each function gives the packed layers of a dense model and leaves the model dense. What a method cannot do of a plan is
refused by name; layers that it only rounds, such as embeddings, follow the plan whatever it says of them.
"""

import copy
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlxflow.errors import CallError
from mlxflow.quantization.codec import Packed, pack
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

#: Rows that the methods look at together.
BATCH_SIZE = 4

_GPTQ_BITS = (2, 4, 8)

# As mlx-lm's: scales that AWQ tries
_AWQ_STEPS = 20

_DWQ_LEARNING_RATE = 1e-5

_MORE_ROWS = "Calibrate on more rows (calibration_rows)."


def require_learnable(method: str, model: nn.Module, plan: Mapping[str, Setting], *, key: str) -> None:
    """Make sure that a method can follow a plan; looks at shapes and classes only.

    Args:
        method: "gptq", "awq", "dwq", or one that learns nothing.
        model: dense; its weights need not be evaluated.
        plan: module path to setting.
        key: of the table with the settings, for messages.

    Raises:
        CallError: it cannot; the first layer that it cannot learn is named.
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
    """Return the codes that a method learns, with its usual settings.

    Args:
        method: "gptq", "awq" or "dwq".
        model: dense, in evaluation mode; see the function of that name.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on.
        seed: of the order of the rows.
        key: of the table with the settings, for messages.

    Raises:
        CallError: the method cannot follow the plan, or there are too few rows.
    """
    mx.eval(model.parameters(), tokens)
    if method == "gptq":
        return gptq(model, plan, tokens[:, :-1], batch_size=BATCH_SIZE, key=key)
    if method == "awq":
        return awq(model, plan, tokens[:, :-1], search_steps=_AWQ_STEPS, key=key)
    return dwq(model, plan, tokens, batch_size=BATCH_SIZE, learning_rate=_DWQ_LEARNING_RATE, seed=seed, key=key)


def gptq(
    model: nn.Module, plan: Mapping[str, Setting], tokens: mx.array, *, batch_size: int, key: str
) -> dict[str, Packed]:
    """Return layers whose codes make up for each other's errors (Frantar et al. 2022, arXiv:2210.17323).

    Linear layers and those of experts are learned, each by its own setting. Those outside of the blocks, such as the
    head, are rounded where they have a setting that GPTQ does not have, and embeddings always.

    Args:
        model: dense, evaluated, in evaluation mode; unchanged.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on.
        batch_size: rows a forward pass.
        key: of the table with the settings, for messages.

    Raises:
        CallError: a plan that mlx-lm's function cannot follow; a matrix whose inputs it cannot invert; codes that are
            not finite.
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
    """Return layers scaled and clipped so that what matters loses least (Lin et al. 2023, arXiv:2306.00978).

    Layers of the blocks are learned, each by its own setting of any mode; embedding and head are rounded. Norms and
    dense weights of the model change with the scales: save the model as it is afterwards.

    Args:
        model: dense, evaluated, in evaluation mode; norms and weights of its blocks are changed in place.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on; all of them are held as activations of a block.
        search_steps: scales tried for each group of layers.
        key: of the table with the settings, for messages.

    Raises:
        CallError: a plan that has no layer of the blocks.
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
    """Return layers whose scales and biases are trained until the logits are near those of the dense model.

    Affine layers under 8 bits are trained, for one pass over the rows; the others are rounded.

    Args:
        model: dense, evaluated, in evaluation mode; unchanged.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on; R at least twice the batch size, the last batch for mlx-lm's validation.
        batch_size: rows a step.
        learning_rate: of Adam.
        seed: of the order of the rows.
        key: of the table with the settings, for messages.

    Raises:
        CallError: a plan that mlx-lm's function cannot follow, or too few rows.
    """
    from mlx_lm.quant.dwq import dwq_quantize

    name = _named("dwq", key)
    require_learnable("dwq", model, plan, key=key)
    if len(tokens) < 2 * batch_size:
        raise CallError(
            f"{name}: needs {2 * batch_size} calibration rows, two batches, and has {len(tokens)}. "
            "Raise calibration_rows."
        )
    student = copy.deepcopy(model)
    layers = quantizable_layers(student)
    student.update_modules(tree_unflatten([(path, packed_layer(layers[path], plan[path])) for path in plan]))
    student.freeze()
    dtype = next(layer.weight.dtype for path, layer in quantizable_layers(model).items() if path in plan)
    rows = [(row, 0) for row in np.array(tokens).tolist()]
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


def choose_rows(marks: Any, *, count: int, seed: int) -> Any:
    """Return the numbers of rows to calibrate on, by chance, those without padding before the others.

    Args:
        marks: (R, L + 1), 0 where there is no token.
        count: of rows wanted; fewer come back where there are fewer.
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

    found: dict[Setting, list[str]] = {}
    for path, layer in quantizable_layers(model).items():
        setting = plan.get(path)
        if (
            setting
            and type(layer) in (nn.Linear, SwitchLinear)
            and setting.mode == "affine"
            and setting.bits in _GPTQ_BITS
        ):
            found.setdefault(setting, []).append(path)
    return found


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
    made = {path: Packed(modules[path].weight, modules[path].scales, modules[path].get("biases")) for path in plan}
    mx.eval(made)
    return made
