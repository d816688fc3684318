"""What is decided before anything is learned: the plan of a model, its bits under a budget, and its rotation."""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.quantization import bit_allocation, block_method, calibrated
from mlxflow.quantization import plan as plans
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.rotation_choice import choose_rotation, require_rotatable
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.start_grid import StartGrid, plan_of, read_start
from mlxflow.report.stage_reports.quantize import RotationFigures
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.training.model_choices import default_objective

#: The setting of the method for messages. Below: of the rotations
BLOCK, _ROTATIONS = '{}.method = "block"', "{}.rotations = {}"


class Chosen(NamedTuple):
    """The model and its plan.

    Attributes:
        dense: the model, rotated or not.
        plan: of its layers.
        budget_losses: in nats per token, of the plans tried for a budget; None without a budget.
        start: codes to start from; None without.
        rotation: that was tried; None without.
    """

    dense: DenseModel
    plan: plans.QuantizationPlan
    budget_losses: list[float] | None
    start: StartGrid | None
    rotation: RotationFigures | None


def choose(request: QuantizationRequest, dense: DenseModel, tokens: TokenPair | None, context: Context) -> Chosen:
    """Return the plan for a model, after checking that the method supports it; and the rotation of the model."""
    key = context.task
    if request.start is not None:
        start = read_start(request.start.files, default=request.default, key=request.start.setting)
        plan = plan_of(start, dense.model, default=request.default, key=request.start.setting)
        return Chosen(dense, plan, None, start, None)
    plan = plans.resolve(dense.model, default=request.default, rules=request.rules, key=key)
    length = None if tokens is None else tokens.train.context_length
    require_supported(request, dense.model, plan.layers, context_length=length, key=key)
    if warning := plan.warning(key):
        terminal.say(warning)
    rotation = None
    if request.rotations and tokens is not None:
        ids, marks = calibration_rows(request, tokens.train, context)
        choice = choose_rotation(
            dense.reopened,
            plan.layers,
            Rows(np.array(ids), np.array(marks)),
            count=request.rotations,
            seed=derive_seed(context.seed, "quantize.rotations"),
            name=_ROTATIONS.format(key, request.rotations),
            task=key,
        )
        rotation = choice.figures
        dense = dense if choice.rotation is None else dense.rotated(choice.rotation)
    if request.budget is None or tokens is None:
        return Chosen(dense, plan, None, None, rotation)
    layers, losses = bit_allocation.allocate_bits(
        dense.model,
        plan,
        request.budget,
        calibration_rows(request, tokens.train, context),
        rules=request.rules,
        objective=default_objective(dense.model, tokens.train, batch_size=request.batch_size),
        batch_size=calibrated.BATCH_SIZE,
    )
    return Chosen(dense, plan._replace(layers=layers), losses, None, rotation)


def require_supported(
    request: QuantizationRequest,
    model: nn.Module,
    layers: Mapping[str, Setting],
    *,
    context_length: int | None,
    key: str,
) -> None:
    """Check that a method supports a plan, by classes and shapes; computes nothing.

    Args:
        request: the method.
        model: dense; its weights need not be evaluated.
        layers: module path to setting.
        context_length: of the rows; None without tokens.
        key: of the table with the settings, for messages.

    Raises:
        UserError: names what the method does not support.
    """
    plans.check_supported(layers, key)
    calibrated.require_learnable(request.method, model, layers, key=key)
    if request.rotations:
        require_rotatable(model, name=_ROTATIONS.format(key, request.rotations))
    if request.method != "block" or context_length is None:
        return
    block_method.require_blocks(model, layers, context_length=context_length, name=BLOCK.format(key))
    if request.scale_steps and not any(one.mode == "affine" for one in layers.values()):
        raise CallError(
            f"{key}.scale_steps = {request.scale_steps}: trains affine layers, and the plan has none. "
            'Set mode = "affine", or scale_steps = 0.'
        )


def calibration_rows(request: QuantizationRequest, tokens: TokenFile, context: Context) -> tuple[mx.array, mx.array]:
    """Return token rows and their marks, (R, L + 1) each, chosen by seed."""
    seed = derive_seed(context.seed, "quantize.calibration")
    chosen = calibrated.choose_rows(tokens.rows.marks, count=request.calibration_rows, seed=seed)
    batch = tokens.rows.take(chosen)
    return mx.array(batch.tokens), mx.array(batch.marks)
