"""Codes learned from text: GPTQ, AWQ and DWQ, each by mlx-lm's own function, on a plan and on rows of tokens.

Each function gives the packed layers of a dense model and leaves the model dense. What mlx-lm's function cannot do of a
plan is refused by name; layers that it only rounds, such as embeddings, follow the plan whatever it says of them.
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
from mlxflow.quantization.adapting import (
    dense_products,
    following,
    numpy_random_kept,
    packed_layer,
    quantizable_layers,
    quiet,
)
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting

_GPTQ_BITS = (2, 4, 8)


def gptq(
    model: nn.Module, plan: Mapping[str, Setting], tokens: mx.array, *, batch_size: int, key: str
) -> dict[str, Packed]:
    """Return layers whose codes make up for each other's errors (Frantar et al. 2022, arXiv:2210.17323).

    The linear layers of the blocks have one affine setting with 2, 4 or 8 bits between them; those outside, such as the
    head, are learned too if theirs is the same, and rounded otherwise, as embeddings are.

    Args:
        model: dense, evaluated, in evaluation mode; unchanged.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on.
        batch_size: rows a forward pass.
        key: of the table with the settings, for messages.

    Raises:
        CallError: a plan that mlx-lm's function cannot follow; a matrix whose inputs it cannot invert.
    """
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.quant.gptq import gptq_quantize

    name = f'{key}.method = "gptq"'
    linear = {
        path: layer for path, layer in quantizable_layers(model).items() if type(layer) in (nn.Linear, SwitchLinear)
    }
    inside = _inside_blocks(model)
    common = _common({path: one for path, one in plan.items() if path in linear and path in inside}, name)
    if common.bits not in _GPTQ_BITS:
        raise CallError(f"{name}: mlx-lm's GPTQ has 2, 4 and 8 bits, and the plan has {common.bits}. Use one of them.")
    learned = {path for path in linear if plan.get(path) == common}
    with following(model, plan, free=learned, hides=True), quiet():
        try:
            gptq_quantize(model, tokens, common.bits, common.group_size, common.bits, common.group_size, batch_size)
        except (RuntimeError, ValueError) as error:
            if "cholesky" not in str(error).lower():
                raise
            raise CallError(f"{name}: {error}. Calibrate on more rows (calibration_rows).") from error
        return _packed_layers(model, plan)


def awq(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    model_type: str,
    search_steps: int,
    key: str,
) -> dict[str, Packed]:
    """Return layers scaled and clipped so that what matters loses least (Lin et al. 2023, arXiv:2306.00978).

    All layers of the blocks have one affine setting between them; embedding and head are rounded, by their own. Norms
    and dense weights of the model change with the scales: save the model as it is afterwards.

    Args:
        model: dense, evaluated, in evaluation mode; norms and dense weights are scaled in place.
        plan: module path to setting.
        tokens: (R, L) ids to calibrate on; all of them are held as activations of a block.
        model_type: the architecture, as `config.json` names it.
        search_steps: scales tried for each group of layers.
        key: of the table with the settings, for messages.

    Raises:
        CallError: an architecture or a plan that mlx-lm's function cannot follow.
    """
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    name = f'{key}.method = "awq"'
    known = AWQ_MODEL_CONFIGS.get(model_type)
    if known is None:
        raise CallError(
            f'{name}: mlx-lm\'s AWQ does not know the architecture "{model_type}". It knows '
            f'{", ".join(sorted(AWQ_MODEL_CONFIGS))}. Use method = "gptq", or "rtn".'
        )
    inside = {path for path in quantizable_layers(model) if path in _inside_blocks(model)}
    dense = sorted(inside - plan.keys())
    if dense:
        raise CallError(f"{name}: mlx-lm's AWQ quantizes every layer of a block, and the plan leaves {dense[0]} dense.")
    common = _common({path: plan[path] for path in plan if path in inside}, name)
    with following(model, plan, free=inside, hides=False), quiet():
        awq_quantize(model, tokens, known, group_size=common.group_size, bits=common.bits, n_grid=search_steps)
        return _packed_layers(model, plan)


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

    name = f'{key}.method = "dwq"'
    _check_trainable(plan, name)
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
    """Return the paths of all layers within the model's blocks; of all there are where it tells no blocks."""
    blocks = getattr(model, "layers", None)
    if not blocks:
        return set(quantizable_layers(model))
    ids = {id(module) for block in blocks for module in block.modules()}
    return {path for path, module in model.named_modules() if id(module) in ids}


def _common(settings: Mapping[str, Setting], name: str) -> Setting:
    """Return the one affine setting of the linear layers in the blocks.

    Raises:
        CallError: there is none, or not one only.
    """
    if not settings:
        raise CallError(f"{name}: the plan has no layer that it could learn. Leave one of the blocks' to be quantized.")
    first, common = next(iter(settings.items()))
    for path, setting in settings.items():
        if setting.mode != "affine":
            raise CallError(f'{name}: learns affine layers, and {path} is {setting.mode}. Set mode = "affine".')
        if setting != common:
            raise CallError(
                f"{name}: takes one setting for all layers of the blocks, and {first} has bits {common.bits} and "
                f"group_size {common.group_size}, {path} bits {setting.bits} and group_size {setting.group_size}. "
                'Give them the same, or use method = "dwq" or "qat".'
            )
    return common


def _check_trainable(plan: Mapping[str, Setting], name: str) -> None:
    for path, setting in plan.items():
        if setting.mode == "symmetric" and setting.bits < 8:
            raise CallError(
                f"{name}: trains scales and biases apart, which moves the fixed zero point of {path}. "
                'Set mode = "affine", or use method = "qat".'
            )
    if not any(setting.mode == "affine" and setting.bits < 8 for setting in plan.values()):
        raise CallError(f"{name}: trains affine layers under 8 bits, and the plan has none. Use fewer bits.")


def _packed_layers(model: nn.Module, plan: Mapping[str, Setting]) -> dict[str, Packed]:
    modules = dict(model.named_modules())
    made = {path: Packed(modules[path].weight, modules[path].scales, modules[path].get("biases")) for path in plan}
    mx.eval(made)
    return made
