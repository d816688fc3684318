"""What a method learns of a model with a plan: packed layers, and the figures of their training."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.models.fp32_on_cpu import widen
from mlxflow.quantization import block_method, calibrated
from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.calibration_text import choose_text
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel
from mlxflow.quantization.distillation import teacher_of
from mlxflow.quantization.learned_codes import LearnedCodes, LearningFiles, learned_once
from mlxflow.quantization.progress import show_parts
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.scale_tuning import TunedScales, tune_scales
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.tuning_saves import TuningSaves, remove_saves
from mlxflow.report.stage_reports.quantize import TeacherFigures
from mlxflow.storage.digests import digest_json
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.run_context import Context, derive_seed

#: The setting of the method for messages.
BLOCK = '{}.method = "block"'


class LearnedLayers(NamedTuple):
    """The result of a method.

    Attributes:
        packed: codes by module path; layers without codes are to be rounded.
        blocks: errors of the blocks, of "block"; empty for other methods.
        tuned: scales of the whole model, of "block"; None without.
        teacher: the cached distributions that were distilled; None without.
    """

    packed: dict[str, Packed]
    blocks: list[block_method.BlockErrors]
    tuned: TunedScales | None
    teacher: TeacherFigures | None


def learn_layers(
    request: QuantizationRequest,
    dense: DenseModel,
    layers: Mapping[str, Setting],
    tokens: TokenFile,
    context: Context,
    *,
    part: str = "",
) -> LearnedLayers:
    """Return the layers that a method without the trainer learns.

    Args:
        request: its method and settings.
        dense: the model; "awq" changes its norms and weights.
        layers: module path to setting.
        tokens: to calibrate on.
        context: of the stage.
        part: of the stage's work, for the files of a run that is resumed; empty for all of it.
    """
    folder = context.unfinished / part if part else context.unfinished
    if request.method == "block":
        learned = _learn_blocks(request, dense, layers, tokens, context, folder)
        if not request.scale_steps:
            return LearnedLayers(learned.packed, learned.errors, None, None)
        tuned, teacher = _tune_scales(request, dense, layers, learned.packed, tokens, context, folder)
        return LearnedLayers(tuned.packed, learned.errors, tuned, teacher)
    if request.method in ("rtn", "qat"):
        return LearnedLayers({}, [], None, None)
    rows, _ = calibration_rows(request, tokens, context)
    seed = derive_seed(context.seed, "quantize.rows")
    files = LearningFiles(folder, _identity(layers, context))

    def learn() -> LearnedCodes:
        packed = calibrated.learn(
            request.method,
            dense.model,
            dense.reopened,
            layers,
            rows.astype(mx.int32),
            files=files,
            seed=seed,
            key=context.task,
        )
        return LearnedCodes(packed)

    if request.method == "dwq":
        codes = learned_once(*files, learn, task=context.task)
        remove_saves(folder)
    else:
        codes = learn()
    return LearnedLayers(codes.packed, [], None, None)


def calibration_rows(
    request: QuantizationRequest, tokens: TokenFile, context: Context, *, skips: int = 0
) -> tuple[mx.array, mx.array]:
    """Return token rows and their marks, (R, L + 1) each, chosen by seed and without padding; see `choose_text`.

    Args:
        request: the number of rows.
        tokens: to choose from.
        context: of the stage.
        skips: rows of the same order that are left out; the first ones are returned if none are left.
    """
    seed = derive_seed(context.seed, "quantize.calibration")
    batch = choose_text(tokens.rows, count=request.calibration_rows, skips=skips, seed=seed)
    return mx.array(batch.tokens), mx.array(batch.marks)


def _identity(layers: Mapping[str, Setting], context: Context) -> str:
    """Return a digest of everything that what is learned of a plan depends on."""
    origin = {name: context.provenance[name] for name in sorted(context.provenance)}
    settings = {path: list(setting) for path, setting in layers.items()}
    return digest_json({"origin": origin, "device": context.device, "layers": settings})


def _learn_blocks(
    request: QuantizationRequest,
    dense: DenseModel,
    layers: Mapping[str, Setting],
    tokens: TokenFile,
    context: Context,
    folder: Path,
) -> block_method.LearnedBlocks:
    """Return the layers that the method "block" learns; its files make an interrupted run resume."""
    key = context.task
    asked = block_method.BlockRequest(
        num_steps=request.block_steps,
        seed=derive_seed(context.seed, "quantize.rows"),
        folder=folder,
        identity=_identity(layers, context),
        name=BLOCK.format(key),
    )
    rows = numpy_of(calibration_rows(request, tokens, context)[0])[:, :-1]
    with show_parts(key, "learning", len(dense.model.layers), "blocks") as watch:
        return block_method.learn_blocks(
            dense.reopened, layers, rows, asked, watch=lambda one: watch(f"{one.path}: error {one.output:.2g}")
        )


def _tune_scales(
    request: QuantizationRequest,
    dense: DenseModel,
    layers: Mapping[str, Setting],
    packed: Mapping[str, Packed],
    tokens: TokenFile,
    context: Context,
    folder: Path,
) -> tuple[TunedScales, TeacherFigures]:
    """Return packed layers with scales and biases trained to the dense model's distributions, which are cached."""
    ids, marks = calibration_rows(request, tokens, context)
    chosen = Rows(numpy_of(ids), numpy_of(marks))
    rows = chosen.tokens[:, :-1]
    teacher = teacher_of(dense, chosen, masks_documents=False, context=context)
    identity = _identity(layers, context)

    def learn() -> LearnedCodes:
        student = dense.reopened()
        apply_plan(student, layers, packed)
        widen(student, at_any_size=True, keeps=layers.keys())
        student.eval()
        saves = TuningSaves(folder, identity, task=context.task, total=request.scale_steps)
        left = request.scale_steps - saves.first
        with show_parts(context.task, "tuning scales", left, "steps") as watch:
            saves.watched_by(lambda losses: watch(f"loss {losses[-1]:.3f}"))
            tuned = tune_scales(
                student,
                layers,
                rows,
                teacher,
                num_steps=request.scale_steps,
                batch_size=min(len(rows), max(1, block_method.TOKENS_PER_STEP // rows.shape[1])),
                seed=derive_seed(context.seed, "quantize.scales"),
                saves=saves,
            )
        return LearnedCodes(tuned.packed, (tuned.first_loss, tuned.last_loss))

    codes = learned_once(folder, identity, learn, task=context.task)
    remove_saves(folder)
    return TunedScales(codes.packed, request.scale_steps, *codes.figures), teacher.figures()
