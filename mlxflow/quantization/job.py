"""The work of the stage `quantize`: choose a plan, calibrate, write the model folder, measure it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.messages import terminal
from mlxflow.models import tokenizer_files
from mlxflow.quantization import block_method, calibrated
from mlxflow.quantization import plan as plans
from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.aware_training import RoundedTraining, train_rounded
from mlxflow.quantization.block_method import BlockErrors
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.distillation import teacher_of
from mlxflow.quantization.judged_text import QuantizationTexts, describe_texts, text_warnings
from mlxflow.quantization.plan_choice import BLOCK, calibration_rows, choose
from mlxflow.quantization.progress import show_layers, show_parts
from mlxflow.quantization.quality import measure_quality
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.scale_tuning import TunedScales, tune_scales
from mlxflow.quantization.streaming_export import Exported, export
from mlxflow.report.stage_reports.quantize import QualityFigures, RotationFigures, TeacherFigures
from mlxflow.storage import config_json, tensor_writing
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context, ModelFolder, derive_seed


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
        rotation: that was tried; None without.
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
    rotation: RotationFigures | None
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
    dense, plan, losses, start, rotation = choose(request, dense, tokens, context)
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
        rows, _ = calibration_rows(request, tokens.train, context)
        seed = derive_seed(context.seed, "quantize.rows")
        packed = calibrated.learn(
            request.method, dense.model, plan.layers, rows.astype(mx.int32), seed=seed, key=context.task
        )
    exported = _write(request, dense, plan, packed, outputs, context)
    name = request.start and request.start.name
    if tokens is None:
        return QuantizationResult(plan, exported, losses, trained, blocks, tuned, name, None, None, None, None, [])
    texts = _texts(request, tokens, context)
    quality = measure_quality(
        dense.folder, tokens.validation, layers=plan.layers, limits=request.limits, texts=texts, context=context
    )
    warnings = [*_warnings(request, tokens, texts, quality, context.task)]
    for warning in warnings:
        terminal.say(warning)
    return QuantizationResult(
        plan, exported, losses, trained, blocks, tuned, name, rotation, teacher, texts, quality, warnings
    )


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
        name=BLOCK.format(key),
    )
    rows = np.array(calibration_rows(request, tokens, context)[0])[:, :-1]
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
    ids, marks = calibration_rows(request, tokens, context)
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


def _warnings(
    request: QuantizationRequest, tokens: TokenPair, texts: QuantizationTexts, quality: QualityFigures, task: str
) -> Iterator[str]:
    """Yield warnings about figures that flatter a method, and about too little text."""
    learns_text = request.training is not None and not request.training.distills
    yield from text_warnings(texts, task=task, perplexity_increase=quality.perplexity_increase, learns_text=learns_text)
    yield from _shortage(request, tokens.train, task)


def _shortage(request: QuantizationRequest, tokens: TokenFile, task: str) -> Iterator[str]:
    """Yield a warning if there are fewer calibration rows than requested."""
    uses = request.budget is not None or request.rotations or request.method not in ("rtn", "qat")
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
    elif request.method != "rtn" or request.budget is not None or request.rotations:
        learned = np.array(calibration_rows(request, tokens.train, context)[0])
    judging = tokens.validation.rows.head(request.limits.max_rows)
    return describe_texts(learned, tokens.train, judging, stage=request.token_stage)


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
