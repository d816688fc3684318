"""Quantization-aware training: its settings, and training with rounded weights in every forward pass."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.data.token_file import TokenFile
from mlxflow.models import adapter_files, fp32_on_cpu, model_folder, quantized_layers
from mlxflow.ops import document_mask
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.distillation import TaughtRows, distilling_objective, taught_rows
from mlxflow.quantization.fake_quant import fake_quantized
from mlxflow.quantization.grid_training import grids_in_training
from mlxflow.quantization.grids import first_grid, is_float, pack_on
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.start_grid import StartGrid
from mlxflow.report.stage_reports.quantize import TeacherFigures
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.training import adapters, build, kernel_selection, objective, output_head, run
from mlxflow.training.figures import TrainingFigures, TrainingRun
from mlxflow.training.settings import SettingNames, TrainingSettings

# The best learning rate found for this number of steps, by `benchmarks/quantize.py recovery`
_LEARNING_RATE, _STEPS = 8e-4, 300

# The highest change of a scale in a step, relative to it: that of EfficientQAT's second phase is of this size
_GRID_RATE = 2e-3

# Of a grid so fine that rounding loses little: the share of the learning rate at which distillation loses less still
# (mxfp8, the tests' model: a divergence of 0.00014 nats; 0.00086 at the whole rate, 0.00069 rounded), and its bits
_FINE_SHARE, _FINE_BITS = 1 / 8, 8

# The same of scales alone, from fewer bits on: at 4 bits, after blocks, Gemma 3 270M has 0.163 nats instead of 0.180,
# SmolLM2-135M 0.110 instead of 0.121
_SCALES_SHARE, _SCALES_BITS = 1 / 4, 4


class RoundedTraining(NamedTuple):
    """The result of quantization-aware training.

    Attributes:
        packed: the codes of the layers that the last forward pass used, by module path.
        kernels: names of the selected kernels.
        figures: of the training.
        teacher: the cached distributions that were distilled; None without.
        run: facts that may differ between equal runs.
    """

    packed: dict[str, Packed]
    kernels: list[str]
    figures: TrainingFigures
    teacher: TeacherFigures | None
    run: TrainingRun


class AwareTraining(NamedTuple):
    """The request for a quantization-aware training.

    Attributes:
        settings: steps, rows, adapters, checkpointing, determinism and the limit of validation rows; see `suited`.
        learning_rate: the highest; "auto" for one that suits the number of steps.
        kernels: "auto", "off" or "require".
        distills: whether to distill the dense model's distributions instead of training on the text.
        trains: "weights" on fixed grids, the "scales" and biases of fixed codes, or "all" of them.
        names: of the settings, for messages.
        description: of the run, see `RunFiles`.
    """

    settings: TrainingSettings
    learning_rate: float | Literal["auto"]
    kernels: kernel_selection.Mode
    distills: bool
    trains: Literal["weights", "scales", "all"]
    names: SettingNames
    description: Mapping[str, Any]


def suited(
    settings: TrainingSettings,
    model: nn.Module,
    *,
    learning_rate: float | Literal["auto"],
    trains_grids: bool,
    rate_share: float,
) -> TrainingSettings:
    """Return settings for quantization-aware training; document mask, fused loss and kernels are off.

    Args:
        settings: steps, rows, adapters, checkpointing, determinism and the limit of validation rows are used.
        model: to train; the dtypes of its weights are used.
        learning_rate: the highest; "auto" for one that suits the number of steps.
        trains_grids: whether scales and biases are trained.
        rate_share: of the highest learning rate, for one that suits.
    """
    types = {value.dtype for _, value in tree_flatten(model.parameters())}
    num_steps = settings.num_steps
    return settings.replace(
        max_batch_size=max(64, settings.batch_size),
        learning_rate=rate_share * _highest_rate(num_steps, trains_grids=trains_grids)
        if learning_rate == "auto"
        else learning_rate,
        warmup_steps=min(max(1, num_steps // 10), num_steps // 2),
        schedule="linear",
        # No decay: weights are pulled to grid points. Low betas: old moments react too late to the rounding error.
        weight_decay=0.0,
        optimizer_options={"betas": [0.9, 0.95], "eps": 1e-12} if trains_grids else {"betas": [0.8, 0.99]},
        precision="fp32" if types == {mx.float32} else "bf16",  # fp32 copies of what stays in 16 bits; see `_rounded`
        eval_every=max(1, num_steps // 2),
    )


def _highest_rate(num_steps: int, *, trains_grids: bool) -> float:
    """Return the learning rate for a number of steps: few steps do not average out the noise of a high one."""
    return _GRID_RATE if trains_grids else _LEARNING_RATE * math.sqrt(min(1.0, num_steps / _STEPS))


def _rate_share(request: AwareTraining, layers: Mapping[str, Setting]) -> float:
    """Return the share of the highest learning rate at which the dense model is distilled into grids of few errors."""
    bits = min(setting.bits for setting in layers.values()) if request.distills else 0
    if bits >= _FINE_BITS:
        return _FINE_SHARE
    # the scales of floating-point modes have 3 bits of mantissa at most: a lower rate would move few of them at all
    is_fine = request.trains == "scales" and not any(map(is_float, layers.values()))
    return _SCALES_SHARE if bits >= _SCALES_BITS and is_fine else 1.0


def _suited(request: AwareTraining, model: nn.Module, layers: Mapping[str, Setting]) -> TrainingSettings:
    return suited(
        request.settings,
        model,
        learning_rate=request.learning_rate,
        trains_grids=request.trains != "weights",
        rate_share=_rate_share(request, layers),
    )


def train_rounded(
    request: AwareTraining,
    dense: DenseModel,
    layers: Mapping[str, Setting],
    tokens: TokenPair,
    start: StartGrid | None,
    *,
    metrics: Path,
    context: Context,
) -> RoundedTraining:
    """Train a model with the rounded weights in place, and pack those that the last forward pass used.

    Args:
        request: settings and kernels.
        dense: the model; trained in place, its adapters fused at the end.
        layers: module path to setting.
        tokens: to train and validate on.
        start: codes and grids to begin with; None to begin with those of the dense weights.
        metrics: gets the learning curve.
        context: of the stage.

    Raises:
        SourceError: there are fewer rows than in one batch.
        StageError: the loss is not finite in many steps.
        SystemExit: a signal ended the run; a checkpoint is saved.
        UserError: a setting does not fit the model, or no batch fits into the memory.
    """
    model, names = dense.model, request.names
    settings = _suited(request, model, layers)
    rows = tokens.train.full_rows(settings.batch_size, names.of("batch_size"), sources=names.sources)
    taught = _taught_rows(request, dense, settings, tokens.train, context)
    _begin(model, settings, names, context)
    kernel_request = kernel_selection.KernelRequest.of(request.kernels, context)
    with (
        kernel_selection.begin_verification(kernel_request) as ahead,
        _rounded(model, layers, start, request.trains) as pack,
    ):
        mx.eval(model.parameters())
        subject = _subject(model, settings, tokens.train, request, names)
        if request.distills:
            subject = _with_teacher(subject, taught, dense.folder)
        rows = rows if taught is None else taught.rows
        kernels = kernel_selection.select_kernels(kernel_request, subject, rows.head(settings.batch_size), ahead)
        files = _run_files(request, tokens, taught, metrics, context)
        result = run.train(
            subject._replace(settings=subject.settings.replace(kernels=tuple(kernels.selected))),
            kernels,
            files,
            task=context.task,
            data_seed=derive_seed(context.seed, "train.batches"),
            memory_limit_bytes=context.memory_limit_bytes,
            if_interrupted=context.if_interrupted,
        )
        packed = pack()
        mx.eval(packed)
    adapter_files.fuse(model)
    figures = TrainingFigures.of(result, num_rows=rows.num_rows, keeps_best=False)
    facts = None if taught is None else taught.teacher.figures()
    return RoundedTraining(packed, kernels.selected, figures, facts, TrainingRun.of(result, kernels))


def _run_files(
    request: AwareTraining, tokens: TokenPair, taught: TaughtRows | None, metrics: Path, context: Context
) -> run.RunFiles:
    return run.RunFiles(
        train=tokens.train.path,
        validation=tokens.validation.path,
        metrics=metrics,
        checkpoints=context.unfinished,
        description=request.description,
        rows=None if taught is None else taught.rows,
    )


def _begin(model: nn.Module, settings: TrainingSettings, names: SettingNames, context: Context) -> None:
    """Add adapters to a model, if there are to be any, and set it to training mode."""
    if settings.adapter_shape is not None:
        seed = derive_seed(context.seed, "train.model")
        adapters.add_adapters(model, settings.adapter_shape, seed=seed, key=names.of("lora.keys"))
    model.train()


@contextmanager
def _rounded(
    model: nn.Module, layers: Mapping[str, Setting], start: StartGrid | None, trains: str
) -> Iterator[Callable[[], dict[str, Packed]]]:
    """Let layers compute with rounded weights until the block ends; yield a function that packs them.

    On a CPU the layers of a 16-bit model compute in fp32 meanwhile, on grids in the stored dtype. Other weights that
    are trained, such as norms, keep 16 bits, so that the written model is that of the last forward pass.
    """
    weights = {f"{path}.weight" for path in layers}
    if trains == "weights":
        mx.eval(model.parameters())
        others = _trained_names(model) - weights
        with fake_quantized(model, layers) as pack, fp32_on_cpu.training_in_fp32(model, keeps=others):
            yield pack
        return
    if start is None:
        dense = quantizable_layers(model)
        packed = {path: _packed(dense[path].weight, setting) for path, setting in layers.items()}
    else:
        start.put_into(model)
        packed = start.packed
    with grids_in_training(model, layers, packed, trains_codes=trains == "all") as pack:
        packed.clear()
        with fp32_on_cpu.training_in_fp32(model, keeps=_trained_names(model) | weights):  # weights hold the codes
            yield pack


def _trained_names(model: nn.Module) -> set[str]:
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def _packed(weight: mx.array, setting: Setting) -> Packed:
    packed = pack_on(weight, setting, first_grid(weight, setting))
    mx.eval(packed)
    return packed


def _taught_rows(
    request: AwareTraining, dense: DenseModel, settings: TrainingSettings, tokens: TokenFile, context: Context
) -> TaughtRows | None:
    """Return the rows to train on with the dense model's cached distributions; None without."""
    if not request.distills:
        return None
    masks = document_mask.masks_conversations(dense.model, tokens)
    num_rows = settings.num_steps * settings.rows_per_step
    return taught_rows(dense, tokens, num_rows=num_rows, masks_documents=masks, context=context)


def _open_teacher(folder: Path) -> nn.Module:
    """Return the teacher: the dense model."""
    teacher, _ = quantized_layers.made_dense(*model_folder.load(folder, lazy=True))
    fp32_on_cpu.widen(teacher)
    mx.eval(teacher.parameters())
    teacher.freeze()
    return teacher


def _subject(
    model: nn.Module, settings: TrainingSettings, tokens: TokenFile, request: AwareTraining, names: SettingNames
) -> build.Subject:
    """Return the model with its settings and loss, the document mask resolved."""
    length, vocab_size = tokens.context_length, tokens.vocab_size
    masks = document_mask.masks_conversations(model, tokens)
    # the fused loss has no gradient for the grid of the head
    fused = (
        not request.distills
        and request.trains == "weights"
        and objective.uses_fused_loss(model, wanted=None, vocab_size=vocab_size, tokens=settings.batch_size * length)
    )
    settings = settings.replace(masks_documents=masks, fused_loss=fused)
    return build.Subject(model, settings, vocab_size, length, names)


def _with_teacher(subject: build.Subject, taught: TaughtRows | None, dense: Path) -> build.Subject:
    """Return a subject with the loss of distillation, from cached distributions or else from the dense model."""
    masks = subject.settings.masks_documents
    if taught is not None:
        head = output_head.find_head(subject.model, subject.vocab_size)
        listed = distilling_objective(masks_documents=masks, head=head)
        return subject._replace(make_objective=lambda uses_kernel: listed)
    whole = objective.distilling_objective(_open_teacher(dense), masks_documents=masks)
    return subject._replace(make_objective=lambda uses_kernel: whole)
