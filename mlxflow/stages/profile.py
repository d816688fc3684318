"""Measure the memory of real training steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta

from mlxflow.device.compute_device import SIZE_PATTERN, parse_size, size_mistake
from mlxflow.errors import StageError
from mlxflow.storage import layout
from mlxflow.workflow import products
from mlxflow.workflow.config import MAX_ROWS, MAX_STEPS, Problem
from mlxflow.workflow.stage import Artifacts, Beside, Context, derive_seed

if TYPE_CHECKING:
    from mlxflow.profiling.step_memory import ProfiledModel
    from mlxflow.training.settings import TrainingSettings

VERSION = 6

#: The artifact depends on this machine; another one makes it stale.
DEVICE_BOUND = True

# Growth of less is the allocator's; of the process's memory, whose readings are noisy, growth of less than a share too
_ACTIVE_FLOOR_BYTES, _PROCESS_FLOOR_BYTES, _PROCESS_FLOOR_SHARE = 64, 4096, 0.01
# Rows in which padding is counted
_PADDING_ROWS = 1024
# Fewer steps are all warm-up, seen from outside MLX
_FEWEST_PROCESS_STEPS = 40
# What is left of a run that was cut off; the page looks for it


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[profile]` table."""

    input: Annotated[str, Meta(description="the dense model: a train stage, whose steps are profiled")] = "train"
    data: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
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
        """Yield gates that nothing could ever fail."""
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
    """The figures and the reading after each step."""

    timeline: Path = Path(layout.TIMELINE)
    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table as it is; note more tokens in a forward pass or in all steps than a machine can compute."""
    own, key = {"batch_size": config.batch_size}, f"{config.input}.batch_size"
    trained = {key: getattr(artifacts.table(config.input), "batch_size", 1)}
    if not (row := products.rows_of(artifacts, config.data)):
        return config
    steps = {"num_steps": config.num_steps, **(own if config.batch_size else trained), **row}
    if config.batch_size:  # that of training is checked there
        products.note_excess(artifacts, (own | row, products.MAX_PASS_TOKENS, "tokens in a forward pass"))
    products.note_excess(artifacts, (steps, products.MAX_TRAINING_TOKENS, "tokens in all"))
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train a copy of the model for some steps, as it was trained, and read the memory all the while.

    Raises:
        SourceError: there are fewer rows than one step takes.
    """
    import mlx.core as mx

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
        parts = _take_steps(config, inputs, context, profiler, settings)
    finally:
        profiler.close()
    timeline = profiler.timeline()
    phases = {"phases": json.dumps(list(profiler.totals))}
    tensor_writing.write_arrays(
        outputs.timeline, timeline, tensor_writing.provenance_metadata(context.provenance) | phases
    )
    parts |= {"leak": _leak(timeline, context), "trend": _trend(timeline)}
    figures = _figures(profiler, before)
    _require_budgets(config, context, figures, parts)
    return {
        "batch_size": settings.batch_size,
        "num_steps": config.num_steps,
        "settings": settings.table(),
        "memory_limit_bytes": context.memory_limit_bytes,
        "cache_limit_bytes": profiler.limits.cache,
        **figures,
        **parts,
        "run": {"mlx_device_info": {key: str(value) for key, value in mx.device_info().items()}},
    }


def settings_of(config: Config, inputs: Inputs, context: Context) -> "TrainingSettings":
    """Return the settings that the model was trained with, with the batch size of the table.

    Raises:
        ArtifactError: the report of the training does not say.
    """
    settings = _trained_settings(config, inputs, context)
    return settings.replace(batch_size=config.batch_size or settings.batch_size)


def model_of(config: Config, inputs: Inputs, context: Context, tokens: Any) -> "ProfiledModel":
    """Return which model is trained.

    Raises:
        ArtifactError: it does not know the tokens.
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
        names=SettingNames(config.input, f"{config.data}.context_length", "workflow.memory_limit"),
    )


def _trained_settings(config: Config, inputs: Inputs, context: Context) -> "TrainingSettings":
    """Return how the model was trained, as its stage reported it."""
    from mlxflow.training.settings import read_settings

    report = inputs.model.with_name(layout.REPORT)
    shown = str(report.relative_to(context.root)) if report.is_relative_to(context.root) else str(report)
    return read_settings(report, shown=shown, task=config.input, key=f"{context.task}.input")


def _packing(inputs: Inputs, rows: Any) -> str:
    """Return how documents were laid into rows, as their stage reported it; else as the rows look."""
    from mlxflow.benchmarking.unpacked_rows import holds_several
    from mlxflow.storage import report_files

    seen = "best-fit" if holds_several(rows) else "none"
    return str(report_files.read_report(inputs.tokens.with_name(layout.REPORT)).get("packing", seen))


def _take_steps(config: Config, inputs: Inputs, context: Context, profiler: Any, settings: Any) -> dict[str, Any]:
    import numpy as np

    from mlxflow.data.token_file import TokenFile
    from mlxflow.profiling import step_memory, suggestions

    tokens = TokenFile.open(inputs.tokens)
    model = model_of(config, inputs, context, tokens)
    rows = tokens.full_rows(settings.rows_per_step, f"{context.task}.batch_size")
    with profiler.sampling():
        measured = step_memory.take_steps(model, rows, settings, profiler, num_steps=config.num_steps)
    parts = {"model_bytes": measured.model_bytes, "composition": measured.composition}
    if not config.suggestions:
        return parts
    marks = rows.marks[:_PADDING_ROWS]
    situation = suggestions.Situation(
        peaks=measured.peaks,
        cache_memory_bytes=measured.composition["cache_bytes"],
        real_share=np.count_nonzero(marks) / marks.size,
        is_gpu=context.device == "gpu",
        packing=_packing(inputs, rows),
        batch_size=_trained_settings(config, inputs, context).batch_size,
    )
    made = suggestions.suggest(model, settings, situation)
    tables = {"packing": config.data, "cache_limit": "workflow"}
    return parts | {
        "suggestions": [
            {
                "key": f"{tables.get(one.name, config.input).partition(':')[0]}.{one.name}",
                "value": one.value,
                "saves_bytes": one.saves_bytes,
                "evidence": one.evidence,
            }
            for one in made
        ]
    }


def _leak(timeline: dict[str, Any], context: Context) -> dict[str, Any]:
    """Return what the readings at the steps' ends say of leaks: of arrays; softer, with MLX's cache; of the process."""
    from mlxflow.profiling.leak_test import LeakTest, find_leak

    def leak_report(found: LeakTest) -> dict[str, Any]:
        return {name: value for name, value in found._asdict().items() if value is not None}

    def softly(values: Any) -> dict[str, Any]:
        if len(values) < _FEWEST_PROCESS_STEPS:
            return {
                "verdict": "none",
                "bytes_per_step": 0.0,
                "note": f"{_FEWEST_PROCESS_STEPS} steps are needed for a verdict",
            }
        return leak_report(
            find_leak(
                values,
                floor_bytes_per_step=_PROCESS_FLOOR_BYTES,
                floor_share=_PROCESS_FLOOR_SHARE,
                limit_bytes=int(values[-1]) + int(timeline["available_bytes"][-1]),
            )
        )

    active = timeline["active_memory_bytes"]
    limit = context.memory_limit_bytes
    strict = find_leak(active, floor_bytes_per_step=_ACTIVE_FLOOR_BYTES, floor_share=0.0, limit_bytes=limit)
    reserved = softly(active + timeline["cache_memory_bytes"])
    return leak_report(strict) | {"reserved": reserved, "process": softly(timeline["rss_bytes"])}


def _trend(timeline: dict[str, Any]) -> dict[str, float]:
    """Return by how many bytes a step each reading rose or fell: the middle of the slopes between halves."""
    import numpy as np

    names = ("active_memory_bytes", "peak_memory_bytes", "cache_memory_bytes", "rss_bytes", "available_bytes")
    half = len(timeline["step"]) // 2
    if not half:
        return {f"{name}_per_step": 0.0 for name in names}
    apart = len(timeline["step"]) - half
    return {
        f"{name}_per_step": float(np.median(timeline[name][apart:] - timeline[name][:half])) / apart for name in names
    }


def _require_budgets(config: Config, context: Context, figures: dict[str, Any], parts: dict[str, Any]) -> None:
    """Fail, with the phase and what would help most, where more memory is used than is allowed.

    Raises:
        StageError: a line for each budget that is exceeded.
    """
    highest = figures["peaks"][0]
    phase = f" in {highest['phase']}" if highest["phase"] else ""
    over = (
        ("max_peak_memory", figures["peak_memory_bytes"], f"step {highest['step']}{phase} took", ""),
        ("max_leak_per_step", parts["leak"]["bytes_per_step"], "arrays leak", " a step"),
    )
    lines = []
    for name, bytes_, said, unit in over:
        budget = getattr(config, name)
        if budget and bytes_ > parse_size(budget, context.memory_limit_bytes):
            lines.append(
                f'{context.task}.{name} = "{budget}": {said} {bytes_ / 1e6:,.3f} MB{unit}. {_advise(parts, name)}'
            )
    if lines:
        raise StageError("\n".join(lines))


def _advise(parts: dict[str, Any], name: str) -> str:
    from mlxflow.workflow.config import toml_value

    if name == "max_leak_per_step":
        return "Look for arrays that are kept from step to step, or for sums that are never evaluated."
    for one in parts.get("suggestions", []):
        saves = f"which is predicted to save {one['saves_bytes'] / 1e6:,.3f} MB"
        return f"Set {one['key']} = {toml_value(one['value'])}, {saves}."
    return "Raise it, or use a smaller model."


def _figures(profiler: Any, before: Any) -> dict[str, Any]:
    """Return the summary of the readings."""
    import numpy as np

    from mlxflow.profiling.step_memory import STEP

    steps = profiler.timeline()
    active = steps["active_memory_bytes"]
    seconds = [phase.seconds for phase in profiler.phases if phase.name == STEP]
    return {
        "active_memory_bytes": int(active[-1]),
        "peak_memory_bytes": int(steps["peak_memory_bytes"].max()),
        "cache_memory_bytes": int(steps["cache_memory_bytes"].max()),
        "rss_before_bytes": before.rss_bytes,
        "rss_bytes": int(steps["rss_bytes"].max()),
        "footprint_bytes": int(steps["footprint_bytes"].max()),
        "available_bytes": int(steps["available_bytes"].min()),
        "device_bytes": int(steps["device_bytes"].max()),
        "median_step_seconds": float(np.median(seconds)),
        "phases": [
            {
                "name": name,
                "calls": total.calls,
                "seconds": total.seconds,
                "peak_memory_bytes": total.peak_memory_bytes,
                "growth_bytes": total.growth_bytes,
            }
            for name, total in profiler.totals.items()
        ],
        "peaks": [peak._asdict() for peak in profiler.highest_peaks],
    }
