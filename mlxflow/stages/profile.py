"""Measure the memory of real training steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import msgspec
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN, parse_size, size_mistake
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import StageError
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.storage.toml_tables import MAX_ROWS, MAX_STEPS, Problem
from mlxflow.workflow import products
from mlxflow.workflow.stage import MEMORY_LIMIT_KEY, Artifacts, Beside, follow_training

if TYPE_CHECKING:
    from mlxflow.profiling.profiler import MemoryProfiler
    from mlxflow.profiling.step_memory import ProfiledModel
    from mlxflow.profiling.suggestions import Suggestion
    from mlxflow.report.stage_reports.profile import PeakParts, ProfileReport, SuggestionFigures
    from mlxflow.training.settings import TrainingSettings

VERSION = 6

#: The artifact depends on the machine; on another one it is stale.
DEVICE_BOUND = True

# Rows in which padding is counted
_PADDING_ROWS = 1024


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[profile]` table."""

    input: Annotated[
        str, Meta(description="the dense model: a train stage, whose steps are profiled; the first of several")
    ] = "train"
    data: Annotated[str, Meta(description="the token files: a pretokenize stage; of several that of the input")] = (
        "pretokenize"
    )
    num_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS, description="training steps measured")] = 20
    batch_size: Annotated[int, Meta(ge=0, le=MAX_ROWS, description="rows in one forward pass; 0: as in training")] = 0
    samples_per_second: Annotated[
        float, Meta(ge=0.001, le=1000, description="readings per second of the sampling thread")
    ] = 20.0
    suggestions: Annotated[bool, Meta(description="whether trials search for settings that save memory")] = True
    max_peak_memory: Annotated[
        str,
        Meta(
            pattern=rf"^$|{SIZE_PATTERN}",
            examples=["4 GB"],
            description="largest peak of MLX's arrays: share of the memory limit, or a size; empty: no limit",
        ),
    ] = ""
    max_leak_per_step: Annotated[
        str,
        Meta(
            pattern=rf"^$|{SIZE_PATTERN}",
            examples=["0 KB"],
            description="the stage fails if MLX's arrays leak more per step; empty: no limit",
        ),
    ] = ""

    def problems(self) -> Iterator[Problem]:
        """Yield limits that no run can exceed."""
        for key in ("max_peak_memory", "max_leak_per_step"):
            if (value := getattr(self, key)) and (expected := size_mistake(value)):
                yield Problem(key, value, expected, "Lower it or remove the key.")


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model, how it was trained, and tokens to train it on."""

    config: Path = Path()
    model: Path = Path()
    beside: tuple[Beside, ...] = ()
    tokens: Path = Path()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage and the tokens from a pretokenize stage."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            config=folder / "config.json",
            model=folder / "model.safetensors",
            beside=(Beside(folder),),
            tokens=artifacts.folder(config.data, "data") / "train.safetensors",
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The report, and the memory readings after each step."""

    timeline: Path = Path(layout.TIMELINE)
    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with the first of several train stages and the tokens that it was trained on.

    More tokens in a forward pass or in all steps than a machine can compute are reported.
    """
    config = follow_training(config, artifacts)
    own, key = {"batch_size": config.batch_size}, f"{config.input}.batch_size"
    trained = {key: getattr(artifacts.table(config.input), "batch_size", 1)}
    if not (row := products.rows_of(artifacts, config.data)):
        return config
    steps = {"num_steps": config.num_steps, **(own if config.batch_size else trained), **row}
    if config.batch_size:  # the train stage checks its own
        products.note_excess(artifacts, (own | row, products.MAX_PASS_TOKENS, "tokens in a forward pass"))
    products.note_excess(artifacts, (steps, products.MAX_TRAINING_TOKENS, "tokens in all"))
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "ProfileReport":
    """Run training steps on a copy of the model, with the settings of its training, and read the memory.

    Raises:
        SourceError: there are fewer rows than in one step.
    """
    from mlxflow.profiling.profiler import MemoryProfiler
    from mlxflow.storage import atomic_folders, tensor_writing

    with atomic_folders.writable(context.unfinished):
        context.unfinished.mkdir(parents=True, exist_ok=True)
        profiler = MemoryProfiler(
            samples_per_second=config.samples_per_second, journal=context.unfinished / layout.TIMELINE_JOURNAL
        )
    before = profiler.read()
    settings = settings_of(config, inputs, context)
    try:
        taken = _take_steps(config, inputs, context, profiler, settings)
    finally:
        profiler.close()
    timeline = profiler.timeline()
    phases = {"phases": json.dumps(list(profiler.totals))}
    tensor_writing.write_arrays(
        outputs.timeline, timeline, tensor_writing.provenance_metadata(context.provenance) | phases
    )
    report = _figures(config, context, settings, taken, profiler, timeline, rss_before_bytes=before.rss_bytes)
    _require_budgets(config, context, report)
    return report


def _figures(
    config: Config,
    context: Context,
    settings: "TrainingSettings",
    taken: "_Taken",
    profiler: "MemoryProfiler",
    timeline: dict[str, Any],
    *,
    rss_before_bytes: int,
) -> "ProfileReport":
    """Return the figures of the profiled steps.

    Args:
        config: the table.
        context: of the stage.
        settings: of the steps.
        taken: the steps.
        profiler: that measured them.
        timeline: of the profiler, by column.
        rss_before_bytes: of the process before the model was loaded.
    """
    import mlx.core as mx

    from mlxflow.profiling import profile_figures
    from mlxflow.report.stage_reports.profile import ProfileReport, ProfileRun

    return ProfileReport(
        batch_size=settings.batch_size,
        num_steps=config.num_steps,
        settings=settings,
        memory_limit_bytes=context.memory_limit_bytes,
        cache_limit_bytes=profiler.limits.cache,
        active_memory_bytes=int(timeline["active_memory_bytes"][-1]),
        peak_memory_bytes=int(timeline["peak_memory_bytes"].max()),
        cache_memory_bytes=int(timeline["cache_memory_bytes"].max()),
        rss_before_bytes=rss_before_bytes,
        rss_bytes=int(timeline["rss_bytes"].max()),
        footprint_bytes=int(timeline["footprint_bytes"].max()),
        available_bytes=int(timeline["available_bytes"].min()),
        device_bytes=int(timeline["device_bytes"].max()),
        median_step_seconds=profile_figures.median_step_seconds(profiler.phases),
        phases=profile_figures.phases(profiler.totals),
        peaks=tuple(profiler.highest_peaks),
        model_bytes=taken.model_bytes,
        composition=taken.composition,
        suggestions=taken.suggestions,
        leak=profile_figures.leak(timeline, context.memory_limit_bytes),
        trend=profile_figures.trend(timeline),
        run=ProfileRun(mlx_device_info={key: str(value) for key, value in mx.device_info().items()}),
    )


def settings_of(config: Config, inputs: Inputs, context: Context) -> "TrainingSettings":
    """Return the settings that the model was trained with, with the batch size of the table.

    Raises:
        ArtifactError: the report of the training has no settings.
    """
    settings = _trained_settings(config, inputs, context)
    return settings.replace(batch_size=config.batch_size or settings.batch_size)


def model_of(config: Config, inputs: Inputs, context: Context, tokens: Any) -> "ProfiledModel":
    """Return the model to profile.

    Raises:
        ArtifactError: its vocabulary does not contain the tokens.
    """
    from mlxflow.models import model_folder
    from mlxflow.profiling.step_memory import ProfiledModel
    from mlxflow.training.settings import SettingNames

    folder, key = inputs.model.parent, f"{context.task}.input"
    tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    return ProfiledModel(
        folder=folder,
        key=key,
        vocab_size=tokens.vocab_size,
        context_length=tokens.context_length,
        seed=derive_seed(context.seed, context.task),
        names=SettingNames.of_stage(config.input, config.data, MEMORY_LIMIT_KEY),
    )


def _trained_settings(config: Config, inputs: Inputs, context: Context) -> "TrainingSettings":
    """Return the settings of the model's training, from the report of its stage."""
    from mlxflow.training.settings import read_settings

    report = inputs.model.with_name(layout.REPORT)
    shown = str(report.relative_to(context.root)) if report.is_relative_to(context.root) else str(report)
    return read_settings(report, shown=shown, task=config.input, key=f"{context.task}.input")


def _packing(inputs: Inputs, data: str) -> str:
    """Return the packing of the rows, from the report of their stage.

    Raises:
        ArtifactError: the report is missing or not valid.
    """
    from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
    from mlxflow.storage import report_structs

    report = inputs.tokens.with_name(layout.REPORT)
    return report_structs.read(report, PretokenizeReport, advice=advise_build(data)).figures.packing


class _Taken(NamedTuple):
    """The measurements of the profiled steps.

    Attributes:
        model_bytes: of the model's weights.
        composition: parts of the peak.
        suggestions: settings that would save memory; None if not requested.
    """

    model_bytes: int
    composition: "PeakParts"
    suggestions: "tuple[SuggestionFigures, ...] | None" = None


def _take_steps(config: Config, inputs: Inputs, context: Context, profiler: Any, settings: Any) -> _Taken:
    import numpy as np

    from mlxflow.data.token_file import TokenFile
    from mlxflow.profiling import step_memory, suggestions

    tokens = TokenFile.open(inputs.tokens)
    model = model_of(config, inputs, context, tokens)
    rows = tokens.full_rows(config.batch_size, f"{context.task}.batch_size", sources=f"{config.data}.sources")
    with profiler.sampling():
        measured = step_memory.take_steps(model, rows, settings, profiler, num_steps=config.num_steps)
    taken = _Taken(measured.model_bytes, measured.composition)
    if not config.suggestions:
        return taken
    marks = rows.marks[:_PADDING_ROWS]
    situation = suggestions.Situation(
        peaks=measured.peaks,
        cache_memory_bytes=measured.composition.cache_bytes,
        real_share=np.count_nonzero(marks) / marks.size,
        is_gpu=context.device == "gpu",
        packing=_packing(inputs, config.data),
        batch_size=_trained_settings(config, inputs, context).batch_size,
    )
    suggested = suggestions.suggest(model, settings, situation)
    return taken._replace(suggestions=tuple(_figures_of(one, config) for one in suggested))


def _figures_of(suggestion: "Suggestion", config: Config) -> "SuggestionFigures":
    """Return a suggestion with the key that the user wrote, or would write: that of a variant names it."""
    from mlxflow.report.stage_reports.profile import SuggestionFigures

    table = {"packing": config.data, "cache_limit": "workflow"}.get(suggestion.name, config.input)
    return SuggestionFigures(
        key=f"{table}.{suggestion.name}",
        value=suggestion.value,
        saves_bytes=suggestion.saves_bytes,
        evidence=suggestion.evidence,
    )


def _require_budgets(config: Config, context: Context, report: "ProfileReport") -> None:
    """Fail if more memory is used than the table allows; name the phase, and the suggestion that saves most.

    Raises:
        StageError: a line for each budget that is exceeded.
    """
    highest = report.peaks[0]
    phase = f" in {highest.phase}" if highest.phase else ""
    over = (
        ("max_peak_memory", report.peak_memory_bytes, f"step {highest.step}{phase} took", ""),
        ("max_leak_per_step", report.leak.bytes_per_step, "arrays leak", " a step"),
    )
    lines = []
    for name, bytes_, verb, unit in over:
        budget = getattr(config, name)
        if budget and bytes_ > parse_size(budget, context.memory_limit_bytes):
            lines.append(
                f'{context.task}.{name} = "{budget}": {verb} {bytes_ / 1e6:,.3f} MB{unit}. {_advise(report, name)}'
            )
    if lines:
        raise StageError("\n".join(lines))


def _advise(report: "ProfileReport", name: str) -> str:
    from mlxflow.storage.toml_tables import toml_value

    if name == "max_leak_per_step":
        return "Look for arrays that are kept from step to step, or for sums that are never evaluated."
    for one in report.suggestions or ():
        saves = f"which is predicted to save {one.saves_bytes / 1e6:,.3f} MB"
        return f"Set {one.key} = {toml_value(one.value)}, {saves}."
    return "Raise it, or use a smaller model."
