"""What is decided before anything is learned: the plan of a model, its bits under a budget, and its rotation."""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.nn as nn

from mlxflow.data.token_file import Rows
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.quantization import block_method, calibrated
from mlxflow.quantization import plan as plans
from mlxflow.quantization.budget_choice import allocate
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.learning import BLOCK, LearnedLayers, calibration_rows
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.rotation_choice import choose_rotation, require_rotatable
from mlxflow.quantization.settings import GPTQ_BITS, Setting
from mlxflow.quantization.start_grid import StartGrid, plan_of, read_start
from mlxflow.report.stage_reports.quantize import BudgetFigures, RotationFigures
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.run_context import Context, derive_seed

# The setting of the rotations for messages
_ROTATIONS = "{}.rotations = {}"


class Chosen(NamedTuple):
    """The model and its plan.

    Attributes:
        dense: the model, rotated or not.
        plan: of its layers.
        learned: by the method in choosing the plan; None if it is still to learn.
        budget: the plans that were measured for a budget; None without a budget.
        start: codes to start from; None without.
        rotation: that was tried; None without.
    """

    dense: DenseModel
    plan: plans.QuantizationPlan
    learned: LearnedLayers | None
    budget: BudgetFigures | None
    start: StartGrid | None
    rotation: RotationFigures | None


def choose(request: QuantizationRequest, dense: DenseModel, tokens: TokenPair | None, context: Context) -> Chosen:
    """Return the plan for a model, after checking that the method supports it; and the rotation of the model."""
    key = context.task
    if request.start is not None:
        start = read_start(request.start.files, default=request.default, key=request.start.setting)
        plan = plan_of(start, dense.model, default=request.default, key=request.start.setting)
        return Chosen(dense, plan, None, None, start, None)
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
            Rows(numpy_of(ids), numpy_of(marks)),
            count=request.rotations,
            seed=derive_seed(context.seed, "quantize.rotations"),
            folder=context.unfinished / "rotations",
            name=_ROTATIONS.format(key, request.rotations),
            task=key,
        )
        rotation = choice.figures
        dense = dense if choice.rotation is None else dense.rotated(choice.rotation)
    if request.budget is None or tokens is None:
        return Chosen(dense, plan, None, None, None, rotation)
    asked = request.budget
    if request.method == "gptq":
        asked = asked._replace(candidate_bits=tuple(bits for bits in asked.candidate_bits if bits in GPTQ_BITS))
        if not asked.candidate_bits:
            raise CallError(f"{key}.candidate_bits: mlx-lm's GPTQ has 2, 4 and 8 bits. Name one of them.")
    made = allocate(request, asked, dense, plan, tokens.train, context)
    return Chosen(made.dense, plan._replace(layers=made.layers), made.learned, made.figures, None, rotation)


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
