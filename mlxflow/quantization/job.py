"""The work of the stage `quantize`: choose a plan, calibrate, write the model folder, measure it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.models import tokenizer_files
from mlxflow.quantization import bit_allocation, block_method, calibrated
from mlxflow.quantization import plan as plans
from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.aware_training import AwareTraining, RoundedTraining, train_rounded
from mlxflow.quantization.block_method import BlockErrors
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.distillation import teacher_of
from mlxflow.quantization.judged_text import QuantizationTexts, describe_texts, text_warnings
from mlxflow.quantization.progress import show_layers, show_parts
from mlxflow.quantization.quality import QualityLimits, measure_quality
from mlxflow.quantization.scale_tuning import TunedScales, tune_scales
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.start_grid import StartGrid, plan_of, read_start
from mlxflow.quantization.streaming_export import Exported, export
from mlxflow.report.stage_reports.quantize import QualityFigures, TeacherFigures
from mlxflow.storage import config_json, tensor_writing
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context, ModelFolder, derive_seed
from mlxflow.training.model_choices import default_objective

_BLOCK = '{}.method = "block"'


class StartRequest(NamedTuple):
    """The request to start from the artifact of a quantize stage.

    Attributes:
        files: its weights and its report.
        name: of the stage.
        setting: the setting that names it and its value, for messages.
    """

    files: Sequence[Path]
    name: str
    setting: str


class QuantizationRequest(NamedTuple):
    """The request for a quantization.

    Attributes:
        method: "rtn", "gptq", "awq", "dwq", "block" or "qat".
        default: the setting of layers that no rule names.
        rules: settings by layer.
        calibration_rows: training rows that learned methods and a budget use.
        budget: under which bits are chosen; None for none.
        training: of "qat"; None for other methods.
        limits: on the cost.
        batch_size: rows in one forward pass, as far as the loss of a budget depends on it.
        token_stage: the stage of the tokens, for the report.
        start: the artifact of a quantize stage whose codes and grids "qat" starts from; None for the dense weights.
        block_steps: updates of each block, of "block".
        scale_steps: updates of all scales and biases afterwards; 0 for none.
    """

    method: str
    default: Setting
    rules: Sequence[plans.Rule]
    calibration_rows: int
    budget: bit_allocation.BudgetRequest | None
    training: AwareTraining | None
    limits: QualityLimits
    batch_size: int
    token_stage: str
    start: StartRequest | None
    block_steps: int
    scale_steps: int


class QuantizationResult(NamedTuple):
    """The result of a quantization.

    Attributes:
        plan: of the layers.
        exported: the written model.
        budget_losses: in nats per token, of the plans tried for a budget; None without a budget.
        training: of "qat"; None for other methods.
        blocks: errors of the blocks, of "block"; empty for other methods.
        tuned: scales of the whole model, of "block"; None without.
        start: the stage whose codes and grids the training started from; None without.
        teacher: the cached distributions that were distilled; None without.
        texts: that the method learned and that judged it; None without tokens.
        quality: the quality loss; None without tokens.
        warnings: about figures that flatter the method.
    """

    plan: plans.QuantizationPlan
    exported: Exported
    budget_losses: list[float] | None
    training: RoundedTraining | None
    blocks: list[BlockErrors]
    tuned: TunedScales | None
    start: str | None
    teacher: TeacherFigures | None
    texts: QuantizationTexts | None
    quality: QualityFigures | None
    warnings: list[str]


def run_job(
    request: QuantizationRequest,
    dense: DenseModel,
    tokens: TokenPair | None,
    *,
    outputs: ModelFolder,
    metrics: Path | None,
    context: Context,
) -> QuantizationResult:
    """Quantize a model and write its folder.

    Args:
        request: method, plan and limits.
        dense: the model; changed.
        tokens: to calibrate, train and measure on; None for rounding without a measurement.
        outputs: of the folder; config and weights are written.
        metrics: gets the learning curve of "qat".
        context: of the stage.

    Raises:
        ArtifactError: a weight is not finite.
        CallError: the method does not support the plan.
        StageError: a limit of the quality loss is exceeded.
        WorkflowError: the plan does not match the model, or the budget cannot be met.
    """
    plan, losses, start = _choose_plan(request, dense, tokens, context)
    packed: dict[str, Packed] = {}
    trained, tuned, teacher, blocks = None, None, None, []
    if tokens is not None and request.training is not None and metrics is not None:
        trained = train_rounded(request.training, dense, plan.layers, tokens, start, metrics=metrics, context=context)
        packed, teacher = trained.packed, trained.teacher
    elif tokens is not None and request.method == "block":
        learned = _learn_blocks(request, dense, plan, tokens.train, context)
        packed, blocks = learned.packed, learned.errors
        if request.scale_steps:
            tuned, teacher = _tune_scales(request, dense, plan, packed, tokens.train, context)
            packed = tuned.packed
    elif tokens is not None and request.method != "rtn":
        rows, _ = _calibration_rows(request, tokens.train, context)
        seed = derive_seed(context.seed, "quantize.rows")
        packed = calibrated.learn(
            request.method, dense.model, plan.layers, rows.astype(mx.int32), seed=seed, key=context.task
        )
    exported = _write(request, dense, plan, packed, outputs, context)
    name = request.start and request.start.name
    if tokens is None:
        return QuantizationResult(plan, exported, losses, trained, blocks, tuned, name, teacher, None, None, [])
    texts = _texts(request, tokens, context)
    quality = measure_quality(
        dense.folder, tokens.validation, layers=plan.layers, limits=request.limits, texts=texts, context=context
    )
    learns_text = request.training is not None and not request.training.distills
    warnings = text_warnings(
        texts, task=context.task, perplexity_increase=quality.perplexity_increase, learns_text=learns_text
    )
    warnings += [*_shortage(request, tokens.train, context.task)]
    for warning in warnings:
        terminal.say(warning)
    return QuantizationResult(plan, exported, losses, trained, blocks, tuned, name, teacher, texts, quality, warnings)


def _learn_blocks(
    request: QuantizationRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    tokens: TokenFile,
    context: Context,
) -> block_method.LearnedBlocks:
    """Return the layers that the method "block" learns; its files make an interrupted run resume."""
    key = context.task
    origin = {name: context.provenance[name] for name in sorted(context.provenance)}
    asked = block_method.BlockRequest(
        num_steps=request.block_steps,
        seed=derive_seed(context.seed, "quantize.rows"),
        folder=context.unfinished,
        identity=digest_json({"origin": origin, "device": context.device}),
        name=_BLOCK.format(key),
    )
    rows = np.array(_calibration_rows(request, tokens, context)[0])[:, :-1]
    with show_parts(key, "learning", len(dense.model.layers), "blocks") as watch:
        return block_method.learn_blocks(
            dense.reopened, plan.layers, rows, asked, watch=lambda one: watch(f"{one.path}: error {one.output:.2g}")
        )


def _tune_scales(
    request: QuantizationRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    packed: Mapping[str, Packed],
    tokens: TokenFile,
    context: Context,
) -> tuple[TunedScales, TeacherFigures]:
    """Return packed layers with scales and biases trained to the dense model's distributions, which are cached."""
    ids, marks = _calibration_rows(request, tokens, context)
    chosen = Rows(np.array(ids), np.array(marks))
    rows = chosen.tokens[:, :-1]
    teacher = teacher_of(dense, chosen, masks_documents=False, context=context)
    student = dense.reopened()
    apply_plan(student, plan.layers, packed)
    student.eval()
    with show_parts(context.task, "tuning scales", request.scale_steps, "steps") as watch:
        tuned = tune_scales(
            student,
            plan.layers,
            rows,
            teacher,
            num_steps=request.scale_steps,
            batch_size=min(len(rows), max(1, block_method.TOKENS_PER_STEP // rows.shape[1])),
            seed=derive_seed(context.seed, "quantize.scales"),
            watch=lambda _, loss: watch(f"loss {loss:.3f}"),
        )
    return tuned, teacher.figures()


def _shortage(request: QuantizationRequest, tokens: TokenFile, task: str) -> Iterator[str]:
    """Yield a warning if there are fewer calibration rows than requested."""
    uses = request.budget is not None or request.method not in ("rtn", "qat")
    if uses and tokens.rows.num_rows < request.calibration_rows:
        yield (
            f"{task}.calibration_rows = {request.calibration_rows}: {request.token_stage} has {tokens.rows.num_rows} "
            "training rows, and the method learned these. Add text to its sources, or lower the number."
        )


def _texts(request: QuantizationRequest, tokens: TokenPair, context: Context) -> QuantizationTexts:
    """Return the names of the texts that the method learned and that judge it."""
    learned = None
    if request.training is not None:
        learned = tokens.train.rows.tokens
    elif request.method != "rtn" or request.budget is not None:
        learned = np.array(_calibration_rows(request, tokens.train, context)[0])
    judging = tokens.validation.rows.head(request.limits.max_rows)
    return describe_texts(learned, tokens.train, judging, stage=request.token_stage)


def _choose_plan(
    request: QuantizationRequest, dense: DenseModel, tokens: TokenPair | None, context: Context
) -> tuple[plans.QuantizationPlan, list[float] | None, StartGrid | None]:
    """Return the plan for a model, the losses of the plans tried for a budget, and the codes to start from."""
    model, key = dense.model, context.task
    if request.start is not None:
        start = read_start(request.start.files, default=request.default, key=request.start.setting)
        return plan_of(start, model, default=request.default, key=request.start.setting), None, start
    plan = plans.resolve(model, default=request.default, rules=request.rules, key=key)
    plans.check_supported(plan.layers, key)
    calibrated.require_learnable(request.method, model, plan.layers, key=key)
    if request.method == "block" and tokens is not None:
        length = tokens.train.context_length
        block_method.require_blocks(model, plan.layers, context_length=length, name=_BLOCK.format(key))
        if request.scale_steps and not any(one.mode == "affine" for one in plan.layers.values()):
            raise CallError(
                f"{key}.scale_steps = {request.scale_steps}: trains affine layers, and the plan has none. "
                'Set mode = "affine", or scale_steps = 0.'
            )
    if warning := plan.warning(key):
        terminal.say(warning)
    if request.budget is None or tokens is None:
        return plan, None, None
    layers, losses = bit_allocation.allocate_bits(
        model,
        plan,
        request.budget,
        _calibration_rows(request, tokens.train, context),
        rules=request.rules,
        objective=default_objective(model, tokens.train, batch_size=request.batch_size),
        batch_size=calibrated.BATCH_SIZE,
    )
    return plan._replace(layers=layers), losses, None


def _calibration_rows(request: QuantizationRequest, tokens: TokenFile, context: Context) -> tuple[mx.array, mx.array]:
    """Return token rows and their marks, (R, L + 1) each, chosen by seed."""
    seed = derive_seed(context.seed, "quantize.calibration")
    chosen = calibrated.choose_rows(tokens.rows.marks, count=request.calibration_rows, seed=seed)
    batch = tokens.rows.take(chosen)
    return mx.array(batch.tokens), mx.array(batch.marks)


def _write(
    request: QuantizationRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    packed: dict[str, Packed],
    outputs: ModelFolder,
    context: Context,
) -> Exported:
    """Write weights, config and their companion files; `packed` is emptied meanwhile."""
    with show_layers(context.task, len(plan.layers)) as watch:
        exported = export(
            dense.model,
            plan.layers,
            file=outputs.model,
            metadata={"format": "mlx"} | tensor_writing.provenance_metadata(context.provenance),
            packed=lambda path: packed.pop(path, None),
            stored=dense.stored if request.method in ("rtn", "block") else {},
            source=str(dense.folder),
            watch=watch,
        )
    table: Mapping[str, Any] = plan.config()
    config_json.write(outputs.config, {**dense.config_json, "quantization": table, "quantization_config": table})
    tokenizer_files.copy_companions(dense.folder, context.folder)
    return exported
