"""DWQ by mlx-lm's function: scales and biases are trained to reproduce the dense model's logits."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.models.fp32_on_cpu import loading_in_fp32_on_cpu, widen
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.mlx_lm_patches import (
    dense_products,
    numpy_random_kept,
    packed_layer,
    packed_layers,
    recomputing_blocks,
)
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.resumable_dwq import train
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.tuning_saves import TuningSaves, unsaved
from mlxflow.storage.host_arrays import numpy_of


def require_trainable(plan: Mapping[str, Setting], name: str) -> None:
    """Check that DWQ supports a plan, by its settings.

    Args:
        plan: module path to setting.
        name: of the setting, for messages.

    Raises:
        CallError: names the first layer that it cannot train, or says that the plan has none.
    """
    for path, setting in plan.items():
        if setting.mode == "symmetric" and setting.bits < 8:
            raise CallError(
                f"{name}: trains scales and biases apart, which moves the fixed zero point of {path}. "
                'Set mode = "affine", or use method = "qat".'
            )
    if not any(setting.mode == "affine" and setting.bits < 8 for setting in plan.values()):
        raise CallError(f"{name}: trains affine layers under 8 bits, and the plan has none. Use fewer bits.")


def train_scales(
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    batch_size: int,
    learning_rate: float,
    seed: int,
    name: str,
    saves: TuningSaves | None = None,
) -> dict[str, Packed]:
    """Return layers whose scales and biases are trained to reproduce the dense model's logits (DWQ).

    Affine layers with less than 8 bits are trained for one pass over the rows; the others are rounded. The quantized
    model is in memory as a whole, the activations of a block at a time; of the dense model, a block at a time is. A
    model in fp16 is trained in fp32, since gradients of a mean over many tokens underflow in fp16. If the result
    diverges more from the dense model than rounding on the rows for validation, rounding is returned, and said.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on; R at least twice the batch size; the last batch is for validation.
        batch_size: rows in a step.
        learning_rate: of Adam.
        seed: of the order of the rows.
        name: of the setting, for messages.
        saves: of the state; the training continues from that of an interrupted run. None to save nothing.

    Raises:
        CallError: mlx-lm's function does not support the plan, or there are too few rows.
    """
    require_trainable(plan, name)
    if len(tokens) < 2 * batch_size:
        needed = f"{name}: needs {2 * batch_size} calibration rows, two batches"
        raise CallError(f"{needed}, and has {len(tokens)}. Raise calibration_rows.")
    teacher = StreamedModel(loading_in_fp32_on_cpu(load))
    student = load()
    dtype = next(layer.weight.dtype for path, layer in quantizable_layers(student).items() if path in plan)
    student = _rounded(student, plan)
    rounded = packed_layers(student, plan)
    trained_in = mx.float32 if dtype == mx.float16 else dtype
    if trained_in != dtype:
        student.set_dtype(mx.float32)
    else:
        widen(student, at_any_size=True, keeps=plan.keys())
    held_out = tokens[-batch_size:, :-1]
    with dense_products(student), recomputing_blocks(student):
        before = _divergence(student, teacher, held_out)
        sizes = {"batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
        _train(student, teacher, tokens, sizes, dtype=trained_in, saves=saves or unsaved())
        after = _divergence(student, teacher, held_out)
    if not after <= before:
        terminal.say(
            f"{name}: diverges by {after:.4g} nats from the dense model on the rows for validation, rounding to "
            f"nearest by {before:.4g}; rounding is taken. Calibrate on more rows (calibration_rows)."
        )
        return rounded
    if trained_in != dtype:
        student.set_dtype(dtype)
    return packed_layers(student, plan)


def _train(
    student: nn.Module,
    teacher: StreamedModel,
    tokens: mx.array,
    settings: Mapping[str, Any],
    *,
    dtype: mx.Dtype,
    saves: TuningSaves,
) -> None:
    """Train the scales of the student in a dtype; the settings are those of `resumable_dwq.train`."""
    rows = [(row, 0) for row in numpy_of(tokens).tolist()]
    with numpy_random_kept():
        train(student, lambda batch: _logits(teacher, batch, dtype), rows, dtype=dtype, saves=saves, **settings)


def _logits(teacher: StreamedModel, batch: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the dense model's logits, in fp32 if the student is trained in it."""
    logits = teacher.logits(batch)
    return logits.astype(mx.float32) if dtype == mx.float32 else logits


def _divergence(student: nn.Module, teacher: StreamedModel, tokens: mx.array) -> float:
    """Return the divergence of a model from the dense one, in nats a token.

    Args:
        student: the model.
        teacher: the dense one.
        tokens: ids, (B, L); the logits of a row at a time are in memory.
    """
    total = 0.0
    for row in range(len(tokens)):
        dense, own = (model(tokens[row : row + 1]).astype(mx.float32) for model in (teacher.logits, student))
        logs, others = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (dense, own))
        total += float((mx.exp(logs) * (logs - others)).sum(axis=-1).mean())
    return total / len(tokens)


def _rounded(model: nn.Module, plan: Mapping[str, Setting]) -> nn.Module:
    """Return a model, frozen, with the layers of a plan rounded one after the other."""
    layers = quantizable_layers(model)
    for path, setting in plan.items():
        layer = packed_layer(layers.pop(path), setting)
        mx.eval(layer.parameters())
        model.update_modules(tree_unflatten([(path, layer)]))
    model.freeze()
    return model
