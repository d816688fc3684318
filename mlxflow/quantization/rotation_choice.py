"""Choose a rotation for a quantization: the best of several, if the rounded model loses less with it."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.rotations import Obstacles, Rotation, logits_difference, obstacles
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_divergence import StoredDivergence
from mlxflow.report.stage_reports.quantize import RotationFigures

# Difference of logits, see `logits_difference`, up to which a rotated model is the same
_TOLERANCE = 1e-4

# Tokens of a row on which that is checked
_CHECKED_TOKENS = 128


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
    folder: Path,
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
        folder: for codes and hidden states; removed afterwards.
        name: of the setting that asks for them and its value, for messages.
        task: of the stage.

    Raises:
        CallError: nothing can be rotated, or a rotation changes the logits.
    """
    found = require_rotatable(load(), name=name)
    parts = {"R1": not found.residual, "R2": not found.heads}
    rotations = [Rotation(seed + number, parts["R1"], parts["R2"]) for number in range(count)]
    difference = _checked(load, rotations[0], rows, name=name)
    try:
        measured = StoredDivergence(load, rows, folder)
        without, *losses = (_divergence(measured, load, plan, one) for one in (None, *rotations))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
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
    measured: StoredDivergence,
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    rotation: Rotation | None,
) -> float:
    """Return the divergence of a model, rotated or not and rounded to nearest, from the dense one in nats."""
    rotated = _rotated(load, rotation)
    stored = measured.store(_rounded(rotated(), plan))
    try:
        return measured.of(rotated, plan, stored)
    finally:
        stored.remove()


def _rounded(model: nn.Module, plan: Mapping[str, Setting]) -> Iterator[tuple[str, Packed]]:
    """Yield the codes of each layer of a plan; the model loses its weight."""
    layers = quantizable_layers(model)
    for path, setting in plan.items():
        yield path, pack(layers.pop(path).pop("weight"), setting)


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

    def logits_of(rotation: Rotation | None) -> Callable[[mx.array], mx.array]:
        """Return a function for one model at a time: embedding and head are in fp32."""

        def exact() -> nn.Module:
            model = load()
            if rotation is not None:
                rotation.apply(model, dtype=mx.float32)
            model.set_dtype(mx.float32)
            return model

        return lambda tokens: StreamedModel(exact).logits(tokens)

    tokens = mx.array(rows.tokens[:1, : min(_CHECKED_TOKENS, rows.tokens.shape[1] - 1)].astype("int32"))
    difference = logits_difference(logits_of(None), logits_of(rotation), tokens)
    if not difference <= _TOLERANCE:
        kind = type(load()).__module__.rpartition(".")[2]
        raise CallError(f"{name}: a rotation changes the logits of {kind} by {difference:.2g}. Set rotations = 0.")
    return difference
