"""Measure the speed of training, and the size and quality of every model."""

import json
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import msgspec
from msgspec import Meta

from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build, command
from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.markdown_tables import write_markdown
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.storage.toml_tables import MAX_ROWS, MAX_SIZE, MAX_STEPS, limit
from mlxflow.workflow import products
from mlxflow.workflow.measured_models import BaseModel, base_model, follow_plan
from mlxflow.workflow.stage import MEMORY_LIMIT_KEY, Artifacts, Beside

if TYPE_CHECKING:
    from mlxflow.benchmarking.measurement import BenchmarkRequest
    from mlxflow.benchmarking.model_measurement import ComparedModels
    from mlxflow.benchmarking.suite import Suite
    from mlxflow.benchmarking.time_budget import Budget
    from mlxflow.report.stage_reports.benchmark import (
        BenchmarkReport,
        ComparisonFigures,
        DeviceFacts,
    )

VERSION = 8  # the workflow's steps leave out the padding after the longest row

#: The artifact depends on the machine; on another one it is stale.
DEVICE_BOUND = True

#: A benchmark measures the training only if there is one; alone in the file, it makes the workflow train.
FOLLOWS = ("train", "quantize")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[benchmark]` table."""

    data: Annotated[
        str, Meta(description="the token files: a pretokenize stage; of several that of the input; empty: none")
    ] = "pretokenize"
    input: Annotated[
        str, Meta(description="the dense model that is trained on: a train stage; the first of several; empty: none")
    ] = "train"
    models: Annotated[
        tuple[str, ...], Meta(min_length=1, description='model stages to compare; "stage:*" is all variants')
    ] = ("train", "quantize:*")
    batch_sizes: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_ROWS)], ...],
        Meta(min_length=1, description="batch sizes to time, by default those for which there are enough rows"),
    ] = (16, 32, 64)
    num_steps: Annotated[
        int, Meta(ge=1, le=MAX_STEPS, description="timed training steps of each recipe at each batch size")
    ] = 100
    convergence_steps: Annotated[
        int,
        Meta(
            ge=0, le=MAX_STEPS, description="steps of the loss curves of a new model, by baseline and workflow; 0: none"
        ),
    ] = 100
    prompt_lengths: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_SIZE)], ...],
        Meta(description="prompt lengths in tokens; empty: a quarter, half and all of the context"),
    ] = ()
    max_validation_rows: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="validation rows used for the perplexity")
    ] = 256
    max_seconds: Annotated[
        float,
        limit(
            1e9,
            "seconds after which rounds, steps and validation rows get fewer, down to a few of each; 0 or inf: none",
        ),
    ] = 900.0
    baseline: Annotated[str, Meta(description="report.toml of an earlier run to compare with")] = ""
    max_regression: Annotated[
        float,
        limit(
            1e6, "share by which a figure may be worse than the baseline's, beyond the noise; inf: any", unlimited=1e6
        ),
    ] = 0.05


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A model to train, models to compare, tokens for both.

    Attributes:
        model: None without training.
        beside: other files of each model, such as adapters.
        tokens: None without tokens.
        validation: None without tokens.
        models: by reference, such as "quantize:q4".
        base_name: without training, the folder that the first quantized model was made from, as written.
        base: its files.
    """

    model: Path | None = None
    configs: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    tokens: Path | None = None
    validation: Path | None = None
    models: dict[str, Path] = {}
    baseline: tuple[Path, ...] = ()
    base_name: str = ""
    base: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the models from train and quantize stages and the tokens from a pretokenize stage."""
        tokens = artifacts.folder(config.data, "data") if config.data else None
        trained = artifacts.folder(config.input, "input") if config.input else None
        references = artifacts.expand(config.models, "models")
        folders = {reference: artifacts.folder(reference, "models") for reference in references}
        every = dict.fromkeys([*([trained] if trained else []), *folders.values()])
        base = BaseModel() if trained else base_model(references, artifacts)
        return cls(
            model=trained / "model.safetensors" if trained else None,
            configs=tuple(folder / "config.json" for folder in every),
            beside=tuple(Beside(folder) for folder in every),
            tokens=tokens / "train.safetensors" if tokens else None,
            validation=tokens / "validation.safetensors" if tokens else None,
            models={reference: folder / "model.safetensors" for reference, folder in folders.items()},
            baseline=artifacts.files((config.baseline,), "baseline") if config.baseline else (),
            base_name=base.name,
            base=base.files,
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The figures."""

    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with the first of several train stages, its tokens, and all of them among the models.

    More tokens in a forward pass, or in all steps, than a machine can compute are reported.
    """
    config = follow_plan(config, artifacts)
    if config.models == Config().models and artifacts.first("train") != "train":
        config = msgspec.structs.replace(config, models=("train:*", "quantize:*"))
    if not (row := products.rows_of(artifacts, config.data)):
        return config
    one_pass: dict[str, int | tuple[int, ...]] = {"batch_sizes": config.batch_sizes, **row}
    products.note_excess(artifacts, (one_pass, products.MAX_PASS_TOKENS, "tokens in a forward pass"))
    if not config.max_seconds:
        for key in ("num_steps", "convergence_steps"):
            steps: dict[str, int | tuple[int, ...]] = {key: getattr(config, key), **one_pass}
            products.note_excess(artifacts, (steps, products.MAX_TRAINING_TOKENS, "tokens in all"))
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "BenchmarkReport":
    """Time training by every recipe, train a new model for a while, then measure every model.

    Raises:
        ArtifactError: the report of the dense model has no training settings, or the baseline is of another version.
        StageError: a figure is worse than the baseline's.
    """
    from mlxflow.benchmarking.measurement import measure
    from mlxflow.benchmarking.rank_efficiency import time_ranks
    from mlxflow.benchmarking.report_comparison import markdown_of_report
    from mlxflow.benchmarking.time_budget import Budget

    baseline = read_benchmark(inputs.baseline[0]) if inputs.baseline else None
    ranks = time_ranks(context, config.input, config.num_steps) if config.input else None
    budget = Budget(config.max_seconds, task=context.task)
    suite = _suite(config, inputs, context, budget)
    models = _compared_models(config, inputs, context)
    report = msgspec.structs.replace(measure(_request(config, context), suite, models, budget), ranks=ranks)
    if report.lowered:
        terminal.say(*(f"{context.task}: {line}" for line in report.lowered))
    write_markdown(markdown_of_report(report))
    if baseline is None:
        return report
    comparison = _compare(config, inputs, context, models, baseline, report)
    return msgspec.structs.replace(report, comparison=comparison)


def _request(config: Config, context: Context) -> "BenchmarkRequest":
    from mlxflow.benchmarking.measurement import BenchmarkRequest
    from mlxflow.benchmarking.time_budget import AskedAmounts

    amounts = AskedAmounts(config.num_steps, config.convergence_steps, config.max_validation_rows, config.max_seconds)
    return BenchmarkRequest(VERSION, _device(context), amounts, config.input, config.data)


def _compare(
    config: Config,
    inputs: Inputs,
    context: Context,
    models: "ComparedModels",
    baseline: "BenchmarkReport",
    report: "BenchmarkReport",
) -> "ComparisonFigures":
    """Return the comparison with the baseline; see `compare_with_baseline`."""
    from mlxflow.benchmarking.baseline import REPETITIONS, compare_with_baseline
    from mlxflow.benchmarking.report_comparison import RepeatedRows
    from mlxflow.benchmarking.time_budget import Budget

    def again(names: Set[str]) -> RepeatedRows:
        budget = Budget(config.max_seconds / REPETITIONS, task=context.task)
        suite = _suite(config, inputs, context, budget)
        training = () if suite is None else suite.measure(only=names)[0]
        return RepeatedRows(training, models.only(names).measure_speeds(budget))

    return compare_with_baseline(
        baseline, report, again, name=config.baseline, max_regression=config.max_regression, task=context.task
    )


def read_benchmark(path: Path) -> "BenchmarkReport":
    """Return the figures in a benchmark's report.

    Raises:
        ArtifactError: it is missing, damaged, of another kind, or of another version; a line names each wrong key.
    """
    from mlxflow.report.stage_reports.benchmark import BenchmarkReport
    from mlxflow.storage import report_files, report_structs

    report = report_files.read_report(path)
    if "training" not in report or "models" not in report:
        raise ArtifactError(f"{path}: no benchmark's report (it has no training and models). Name one.")
    if report.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: version = {report.get('version', 'none')}: expected {VERSION}. "
            f"Measure it again with this version of mlxflow: {command('build benchmark')}"
        )
    return report_structs.parse(report, BenchmarkReport, shown=str(path), advice=advise_build("benchmark")).figures


def _suite(config: Config, inputs: Inputs, context: Context, budget: "Budget") -> "Suite | None":
    """Return the training benchmark; None without a model that was trained here."""
    if inputs.model is None or inputs.tokens is None:
        return None
    from mlxflow.benchmarking.suite import Suite, sizes_with_rows
    from mlxflow.data.token_file import TokenFile
    from mlxflow.models import model_folder
    from mlxflow.training.settings import SettingNames, read_settings

    tokens = TokenFile.open(inputs.tokens)
    folder, key = inputs.model.parent, f"{context.task}.input"
    tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    report = folder / layout.REPORT
    settings = read_settings(report, shown=str(report.relative_to(context.root)), task=config.input, key=key)
    default = Config().batch_sizes
    sizes = sizes_with_rows(
        config.batch_sizes, default, own=settings.batch_size, num_rows=tokens.rows.num_rows, task=context.task
    )
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    seed = derive_seed(context.seed, context.task)
    has_adapters = settings.adapter_shape is not None
    return Suite(
        load=partial(model_folder.load_for_steps, folder, key, trains_adapters=has_adapters),
        build=lambda: model_folder.build(model_config, seed=seed, code=folder),
        tokens=tokens,
        settings=settings,
        names=SettingNames.of_stage(config.input, config.data, MEMORY_LIMIT_KEY),
        batch_sizes=sizes,
        num_steps=config.num_steps,
        memory_limit_bytes=context.memory_limit_bytes,
        seed=seed,
        budget=budget,
    )


def _device(context: Context) -> "DeviceFacts":
    from mlxflow.device import compute_device
    from mlxflow.report.stage_reports.benchmark import DeviceFacts

    return DeviceFacts(kind=context.device, name=compute_device.name(), processor=compute_device.processor())


def _compared_models(config: Config, inputs: Inputs, context: Context) -> "ComparedModels":
    """Return the models to measure, with the settings of the measurement."""
    from mlxflow.benchmarking.model_measurement import ComparedModels

    base = {inputs.base_name: inputs.base[0].with_name("model.safetensors")} if inputs.base else {}
    return ComparedModels(
        base | inputs.models,
        inputs.model or next(iter(base.values()), None),
        inputs.validation,
        config.prompt_lengths,
        config.max_validation_rows,
        context.memory_limit_bytes,
        key=f"{context.task}.models",
    )
