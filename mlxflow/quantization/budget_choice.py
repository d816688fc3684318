"""The plan of a model within a budget, by the method that will be used: its errors, and its measured plans."""

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.messages import terminal
from mlxflow.models.fp32_on_cpu import loading_in_fp32_on_cpu
from mlxflow.ops import document_mask
from mlxflow.quantization import bit_allocation, budget
from mlxflow.quantization import plan as plans
from mlxflow.quantization.block_calls import blocks_answering
from mlxflow.quantization.calibrated import scaled_model
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.cost_correction import Observation, corrected_costs
from mlxflow.quantization.dense_model import DenseModel
from mlxflow.quantization.done_work import TRIAL
from mlxflow.quantization.grids import first_grid, pack_on
from mlxflow.quantization.layer_inputs import with_codes
from mlxflow.quantization.learning import LearnedLayers, calibration_rows, learn_layers
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.rounding_check import rounded_codes
from mlxflow.quantization.sensitivity import Costs, error_slopes, measure_costs, projected_costs
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_codes import CodesOnDisk, StoredCodes, emptied
from mlxflow.quantization.stored_divergence import StoredDivergence
from mlxflow.quantization.streamed_gradients import GradientRows, Objective
from mlxflow.report.stage_reports.quantize import BudgetFigures, BudgetPlanFigures
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.run_context import Context
from mlxflow.training.objective import make_objective

#: Rows whose gradients estimate the costs of a learned method, and give the slopes at measured plans.
SLOPE_ROWS = 32

#: Uniform plans that are measured beside the mixed one; of a method that learns one, the best by its estimated cost.
UNIFORM = {"rtn": 3, "qat": 3}

#: The most plans of corrected costs, by method: one that learns before it trains would learn each of them.
CORRECTIONS = {"rtn": 2, "qat": 2}

# Bits from which DWQ does not train
_DWQ_BITS = 8


class Allocation(NamedTuple):
    """The result: the layers of the plan, the model, what the method learned, and the figures for the report.

    Attributes:
        layers: module path to setting.
        dense: the model as the method left it.
        learned: by the method; None if it is still to be trained.
        figures: of the plans that were measured.
    """

    layers: dict[str, Setting]
    dense: DenseModel
    learned: LearnedLayers | None
    figures: BudgetFigures


class _Tried(NamedTuple):
    """A plan that was measured, with the codes of all its layers."""

    name: str
    layers: dict[str, Setting]
    dense: DenseModel
    learned: LearnedLayers
    stored: CodesOnDisk
    divergence: float


def allocate(
    request: QuantizationRequest,
    asked: bit_allocation.BudgetRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    tokens: TokenFile,
    context: Context,
) -> Allocation:
    """Return the best measured plan within a budget: a mixed one, or a uniform one of the same size.

    The costs of each layer are those of codes that the method learns in a uniform plan of each candidate. The mixed
    plan of least cost and uniform plans within the budget are then learned and measured on training rows that the
    method has not seen, as far as there are any. Training ("qat") is not repeated for each of them: its plans are
    measured on the grids that it begins with. Of the methods in `CORRECTIONS`, further mixed plans follow, of costs
    that are corrected by slopes at those measured.

    Args:
        request: the method.
        asked: the budget.
        dense: the model.
        plan: bits and group sizes that a rule sets are kept.
        tokens: to calibrate on.
        context: of the stage.

    Raises:
        WorkflowError: the mode does not support a candidate, or even the smallest candidates exceed the budget.
    """
    room = bit_allocation.room_of(dense.model, plan, asked, rules=request.rules)
    rows = _gradient_rows(request, dense, tokens, context)
    costs = _costs(request, dense, room.candidates, tokens, context, rows)
    trials = _MeasuredPlans(request, dense, tokens, context)
    uniform = UNIFORM.get(request.method, 1)
    for name, layers in bit_allocation.plans_within(room, costs, asked, most_uniform=uniform).items():
        trials.measure(name, layers)
    _correct(trials, room, costs, asked, _few(rows), most=CORRECTIONS.get(request.method, 0))
    tried = trials.tried
    best = min(tried, key=lambda one: one.divergence)
    figures = BudgetFigures(
        measured_with="grids to begin with" if request.method == "qat" else request.method,
        plans=tuple(
            BudgetPlanFigures(
                name=one.name,
                bits_per_weight=8 * budget.plan_bytes(one.layers, room.sizes) / room.parameters,
                divergence=one.divergence,
                is_chosen=one is best,
            )
            for one in tried
        ),
    )
    terminal.say(_described(figures, context.task))
    return Allocation(best.layers, best.dense, None if request.method == "qat" else best.learned, figures)


class _MeasuredPlans:
    """Plans that a method learns and that are measured, one after the other, in `tried`."""

    def __init__(self, request: QuantizationRequest, dense: DenseModel, tokens: TokenFile, context: Context) -> None:
        ids, marks = calibration_rows(request, tokens, context, skips=request.calibration_rows)
        rows = Rows(numpy_of(ids), numpy_of(marks))
        self._request, self._dense, self._tokens, self._context = request, dense, tokens, context
        self._measured = StoredDivergence(dense.reopened, rows, context.unfinished / "measured")
        self.tried: list[_Tried] = []

    def measure(self, name: str, layers: Mapping[str, Setting]) -> None:
        """Learn a plan and measure it."""
        request, dense = self._request, self._dense
        own = dense._replace(model=dense.reopened())
        part = f"plan-{len(self.tried)}"
        learned = learn_layers(request, own, layers, self._tokens, self._context, part=part)
        paths = list(learned.packed)
        made = (emptied(learned.packed), _rounded_layers(request, dense.reopened(), layers, known=paths))
        stored = self._measured.store(itertools.chain(*made))
        with _reopening(request, own) as load:
            divergence = self._measured.of(load, layers, stored)
        codes = stored.unread()  # and not those that were evaluated
        learned = learned._replace(packed={path: codes[path] for path in paths})
        self.tried.append(_Tried(name, dict(layers), own, learned, stored, divergence))

    def observed(self, one: _Tried, paths: Sequence[str], rows: GradientRows) -> Observation:
        """Return the slopes of some layers at a plan that was measured."""
        dense = self._dense.reopened
        load = loading_in_fp32_on_cpu(with_codes(dense, one.layers, one.stored.unread))
        return Observation(one.layers, error_slopes(load, loading_in_fp32_on_cpu(dense), paths, rows))


def _correct(
    trials: _MeasuredPlans,
    room: bit_allocation.BudgetRoom,
    costs: Costs,
    asked: bit_allocation.BudgetRequest,
    rows: GradientRows,
    *,
    most: int,
) -> None:
    """Measure further mixed plans: of costs that are corrected by slopes at plans that were measured.

    The first slopes are those at the mixed plan and at the best uniform one. No plan is measured twice.
    """
    paths = [path for path, some in room.candidates.items() if len(some) > 1]
    mixed, *uniform = trials.tried
    seen = [mixed, *sorted(uniform, key=lambda one: one.divergence)[:1]]
    observations: list[Observation] = []
    for number in range(most):
        observations += [trials.observed(one, paths, rows) for one in seen]
        plan = bit_allocation.mixed_plan(room, corrected_costs(costs, observations), asked)
        if any(plan == one.layers for one in trials.tried):
            return
        trials.measure(f"{bit_allocation.MIXED} {number + 2}", plan)
        seen = trials.tried[-1:]


def _described(figures: BudgetFigures, task: str) -> str:
    shown = ", ".join(f"{one.name} {one.bits_per_weight:.2f} bits {one.divergence:.4g}" for one in figures.plans)
    chosen = next(one for one in figures.plans if one.is_chosen)
    is_mixed = chosen.name.startswith(bit_allocation.MIXED)
    verb = "is taken" if is_mixed else "is taken, since it diverges less than the mixed one"
    return f"{task}: divergence of the plans in nats: {shown}; {chosen.name} {verb}"


@contextmanager
def _reopening(request: QuantizationRequest, own: DenseModel) -> Iterator[Callable[[], nn.Module]]:
    """Yield a function that returns a model with lazy weights: of "awq", the changed one, which is restored."""
    if request.method != "awq":
        yield own.reopened
        return
    before = own.model.parameters()
    try:
        yield lambda: own.model
    finally:
        own.model.update(before)


def _rounded_layers(
    request: QuantizationRequest, model: nn.Module, layers: Mapping[str, Setting], *, known: Container[str]
) -> Iterator[tuple[str, Packed]]:
    """Yield the codes of the layers without any, by the method's rounding; the model loses their weights."""
    return rounded_codes(model, layers, known=known, packing=partial(_rounded, request.method))


def _rounded(method: str, weight: mx.array, setting: Setting) -> Packed:
    """Return the codes of a weight by a method that learns nothing before it trains."""
    return pack_on(weight, setting, first_grid(weight, setting)) if method == "qat" else pack(weight, setting)


def _costs(
    request: QuantizationRequest,
    dense: DenseModel,
    candidates: Mapping[str, Sequence[Setting]],
    tokens: TokenFile,
    context: Context,
    rows: GradientRows,
) -> Costs:
    """Return the estimated divergence of each layer at each of its candidates, with the codes of the method."""
    merged: Costs = {path: dict.fromkeys(some, 0.0) for path, some in candidates.items()}
    candidates = {path: some for path, some in candidates.items() if len(some) > 1}
    load = loading_in_fp32_on_cpu(dense.reopened)
    if request.method == "rtn":
        dtypes = {layer.weight.dtype for path, layer in quantizable_layers(dense.model).items() if path in candidates}
        return merged | measure_costs(load, candidates, rows, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    with StoredCodes.in_folder(context.unfinished / "codes") as stored:
        for costs in _learned_costs(request, dense, candidates, tokens, context, _few(rows), stored):
            for path, options in costs.items():
                merged[path] |= options
    return merged


def _gradient_rows(
    request: QuantizationRequest, dense: DenseModel, tokens: TokenFile, context: Context
) -> GradientRows:
    """Return the calibration rows, and the loss whose gradients estimate costs."""
    ids, marks = calibration_rows(request, tokens, context)
    objective = _objective(loading_in_fp32_on_cpu(dense.reopened), tokens)
    return GradientRows(ids, marks, objective, context.unfinished / "gradients")


def _few(rows: GradientRows) -> GradientRows:
    return rows._replace(tokens=rows.tokens[:SLOPE_ROWS], marks=rows.marks[:SLOPE_ROWS])


def _learned_costs(
    request: QuantizationRequest,
    dense: DenseModel,
    candidates: Mapping[str, Sequence[Setting]],
    tokens: TokenFile,
    context: Context,
    rows: GradientRows,
    stored: StoredCodes,
) -> Iterator[Costs]:
    """Yield the costs of codes that a method learns in uniform plans."""
    settings = sorted({one for some in candidates.values() for one in some})
    for number, setting in enumerate(settings):  # not a bar: the method shows its own
        what = f"{setting.bits} bits in groups of {setting.group_size}"
        terminal.say(f"{context.task}: errors of {request.method} with {what}, {number + 1} of {len(settings)}")
        layers = {path: setting for path, some in candidates.items() if setting in some}
        own, codes = _codes(request, dense, layers, tokens, context, number)
        stored.put(setting, codes)
        if request.method == "awq":  # its codes are of scaled weights
            scaled = loading_in_fp32_on_cpu(scaled_model(own.reopened, _folder(context, number)))
            yield projected_costs(scaled, {path: [setting] for path in layers}, stored.read, rows)
    if request.method != "awq":
        yield projected_costs(loading_in_fp32_on_cpu(dense.reopened), candidates, stored.read, rows)


def _objective(load: Callable[[], nn.Module], tokens: TokenFile) -> Objective:
    """Return the loss whose gradients estimate costs, found without holding the model."""
    streamed = StreamedModel(load)
    masks = document_mask.masks_conversations(streamed.model, tokens, passes=streamed.passes)
    with blocks_answering(streamed.model, lambda _, x, *__: x) if streamed.has_blocks else nullcontext():
        return make_objective(streamed.model, fused=True, vocab_size=tokens.vocab_size, masks_documents=masks)


def _codes(
    request: QuantizationRequest,
    dense: DenseModel,
    layers: Mapping[str, Setting],
    tokens: TokenFile,
    context: Context,
    number: int,
) -> tuple[DenseModel, Iterator[tuple[str, Packed]]]:
    """Return the codes that a method learns in a uniform plan, and the model that they stand for.

    Blocks are compensated and not trained, and scales are not tuned afterwards.
    """
    own = dense._replace(model=dense.reopened())
    setting = next(iter(layers.values()))
    if request.method == "qat" or (request.method == "dwq" and setting.bits >= _DWQ_BITS):
        return own, _rounded_layers(request, dense.reopened(), layers, known=())
    asked = request._replace(block_steps=0, scale_steps=0)
    return own, emptied(learn_layers(asked, own, layers, tokens, context, part=_folder(context, number).name).packed)


def _folder(context: Context, number: int) -> Path:
    """Return the folder of what a method writes while it learns a uniform plan."""
    return context.unfinished / f"{TRIAL}{number}"
