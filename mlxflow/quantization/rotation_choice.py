"""Choose a rotation for a quantization: the best of several, if the rounded model loses less with it."""

import gc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.dense_reference import Reference
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.layer_inputs import with_codes
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.rotations import Obstacles, Rotation, logits_difference, obstacles
from mlxflow.quantization.scale_groups import loading_in_fp32_on_cpu
from mlxflow.quantization.settings import Setting
from mlxflow.report.stage_reports.quantize import RotationFigures

# Difference of logits, see `logits_difference`, up to which a rotated model is the same
_TOLERANCE = 1e-4

# Tokens of a row on which that is checked
_CHECKED_TOKENS = 128

# Rows in a forward pass
_BATCH_SIZE = 8


class RotationChoice(NamedTuple):
    """The result: the rotation, None if none lowers the divergence, and the figures for the report."""

    rotation: Rotation | None
    figures: RotationFigures


def require_rotatable(model: nn.Module, *, name: str) -> Obstacles:
    """Return what cannot be rotated in a model, after checking that something can be.

    Args:
        model: dense; its weights may be lazy.
        name: of the setting that asks for rotations and its value, for messages.

    Raises:
        CallError: nothing can be rotated.
    """
    found = obstacles(model)
    if found.residual and found.heads:
        kind = type(model).__module__.rpartition(".")[2]
        raise CallError(f"{name}: {kind} cannot be rotated: {found.residual}; {found.heads}. Set rotations = 0.")
    return found


def choose_rotation(
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    rows: Rows,
    *,
    count: int,
    seed: int,
    name: str,
    task: str,
) -> RotationChoice:
    """Try rotations of a model, and return the one with the least divergence of the rounded from the dense model.

    Args:
        load: returns the dense model in eval mode, with weights of its own.
        plan: module path to setting.
        rows: to measure on.
        count: rotations to try.
        seed: of the first; the others have the numbers after it.
        name: of the setting that asks for them and its value, for messages.
        task: of the stage.

    Raises:
        CallError: nothing can be rotated, or a rotation changes the logits.
    """
    found = require_rotatable(load(), name=name)
    parts = {"R1": not found.residual, "R2": not found.heads}
    rotations = [Rotation(seed + number, parts["R1"], parts["R2"]) for number in range(count)]
    difference = _checked(load, rotations[0], rows, name=name)
    reference = Reference.of(StreamedModel(loading_in_fp32_on_cpu(load)))
    without, *losses = (_divergence(reference, load, plan, one, rows) for one in (None, *rotations))
    best = min(range(count), key=losses.__getitem__)
    is_kept = losses[best] < without
    figures = RotationFigures(
        is_kept=is_kept,
        parts=tuple(part for part, is_possible in parts.items() if is_possible),
        left_out="; ".join(f"{part}: {why}" for part, why in zip(("R1", "R2"), found, strict=True) if why),
        seed=rotations[best].seed,
        logits_difference=difference,
        divergence=losses[best],
        divergence_without=without,
        divergences=tuple(losses),
    )
    terminal.say(_described(figures, task))
    return RotationChoice(rotations[best] if is_kept else None, figures)


def _divergence(
    reference: Reference,
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    rotation: Rotation | None,
    rows: Rows,
) -> float:
    """Return the divergence of a model, rotated or not and rounded to nearest, from the dense one in nats."""
    model = _rotated(load, rotation)()
    layers = quantizable_layers(model)
    codes: dict[str, Packed] = {}
    for path, setting in plan.items():
        codes[path] = pack(layers[path].weight, setting)
        mx.eval(codes[path])
        layers.pop(path).pop("weight")
    rounded = StreamedModel(loading_in_fp32_on_cpu(with_codes(_rotated(load, rotation), plan, codes)))
    lost = measure_divergence(reference, rounded, rows, batch_size=_BATCH_SIZE, masks_documents=False).kl
    del rounded, codes
    gc.collect()  # codes in reference cycles, before the next rotation has its own
    return lost


def _rotated(load: Callable[[], nn.Module], rotation: Rotation | None) -> Callable[[], nn.Module]:
    def loaded() -> nn.Module:
        model = load()
        if rotation is not None:
            rotation.apply(model)
        return model

    return loaded


def _described(figures: RotationFigures, task: str) -> str:
    verb = "kept" if figures.is_kept else "not kept"
    left_out = f" ({figures.left_out})" if figures.left_out else ""
    return (
        f"{task}: rotation {' and '.join(figures.parts)} is {verb}: the rounded model diverges by "
        f"{figures.divergence:.4g} nats with it, by {figures.divergence_without:.4g} without{left_out}"
    )


def _checked(load: Callable[[], nn.Module], rotation: Rotation, rows: Rows, *, name: str) -> float:
    """Return the difference of the logits that a rotation makes in fp32.

    Raises:
        CallError: it is more than rounding.
    """

    def exact() -> nn.Module:
        model = load()
        model.set_dtype(mx.float32)
        return model

    dense, rotated = StreamedModel(exact), StreamedModel(_rotated(exact, rotation))
    tokens = mx.array(rows.tokens[:1, : min(_CHECKED_TOKENS, rows.tokens.shape[1] - 1)].astype("int32"))
    difference = logits_difference(dense.logits, rotated.logits, tokens)
    if not difference <= _TOLERANCE:
        kind = type(dense.model).__module__.rpartition(".")[2]
        raise CallError(f"{name}: a rotation changes the logits of {kind} by {difference:.2g}. Set rotations = 0.")
    return difference
