"""Measure the memory of real training steps."""

from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from mlxflow.stage import Artifacts, Context, derive_seed

VERSION = 3

#: The artifact tells about this machine; another one is another input.
DEVICE_BOUND = True


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[profile]` table."""

    input: Annotated[str, Meta(description="the dense model: a train stage, whose steps are taken")] = "train"
    data: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[int, Meta(ge=1, description="training steps measured")] = 20
    batch_size: Annotated[int, Meta(ge=1, description="rows in one forward pass")] = 32


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model, how it was trained, and tokens to train it on."""

    config: Path = Path()
    model: Path = Path()
    trained: Path = Path()
    tokens: Path = Path()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage and the tokens from a pretokenize stage."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            config=folder / "config.json",
            model=folder / "model.safetensors",
            trained=folder / "report.toml",
            tokens=artifacts.folder(config.data, "data") / "train.safetensors",
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The figures and the reading after each step."""

    timeline: Path = Path("timeline.safetensors")
    report: Path = Path("report.toml")


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train a copy of the model for some steps, as it was trained, and read the memory all the while.

    Raises:
        SourceError: there are fewer rows than one step takes.
    """
    import mlx.core as mx

    from mlxflow import artifact
    from mlxflow.measurement.memory import MemoryProfiler

    profiler = MemoryProfiler()
    before = profiler.read()
    settings = _settings(config, inputs)
    parts = _take_steps(config, inputs, context, profiler, settings)
    timeline = profiler.timeline()
    artifact.write_arrays(outputs.timeline, timeline, artifact.provenance_metadata(context.provenance))
    return {
        "batch_size": config.batch_size,
        "num_steps": config.num_steps,
        "settings": settings._asdict(),
        "memory_limit_bytes": context.memory_limit_bytes,
        **_figures(profiler, before),
        **parts,
        "run": {"mlx_device_info": {key: str(value) for key, value in mx.device_info().items()}},
    }


def _settings(config: Config, inputs: Inputs) -> Any:
    """Return the settings that the model was trained with."""
    from mlxflow import artifact
    from mlxflow.training.measured import Settings

    told = artifact.read_report(inputs.trained).get("settings", {})
    every = told.get("checkpointing", "none")
    return Settings(
        batch_size=config.batch_size,
        grad_accum_steps=told.get("grad_accum_steps", 1),
        optimizer=told.get("optimizer", "adamw"),
        optimizer_options=told.get("optimizer_options", {}),
        precision=told.get("precision", "fp32"),
        checkpoint_every=every if isinstance(every, int) else int(every == "layers"),
        fused_loss=told.get("fused_loss", False),
    )


def _job(config: Config, inputs: Inputs, context: Context, tokens: Any) -> Any:
    from mlxflow import artifact, models, packed
    from mlxflow.training.adapters import AdapterShape
    from mlxflow.training.profiling import Job

    told = artifact.read_report(inputs.trained).get("settings", {})
    folder, key = inputs.model.parent, f"{context.task}.input"
    tokens.require_vocabulary(models.vocab_size(folder), key)
    shape = AdapterShape(told["method"], **told["lora"]) if told.get("method", "full") != "full" else None
    masks = tokens.has_conversations and packed.can_mask_documents(models.load_dense(folder, key), tokens.vocab_size)
    return Job(
        folder=folder,
        key=key,
        adapters=shape,
        vocab_size=tokens.vocab_size,
        context_length=tokens.context_length,
        masks_documents=masks,
        seed=derive_seed(context.seed, context.task),
    )


def _take_steps(config: Config, inputs: Inputs, context: Context, profiler: Any, settings: Any) -> dict[str, Any]:
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training import profiling

    tokens = TokenFile.open(inputs.tokens)
    job = _job(config, inputs, context, tokens)
    rows = tokens.full_rows(settings.batch_size * settings.grad_accum_steps, f"{context.task}.batch_size")
    with profiler.sampling():
        model_bytes, _, composition = profiling.take_steps(job, rows, settings, profiler, num_steps=config.num_steps)
    return {"model_bytes": model_bytes, "composition": composition}


def _figures(profiler: Any, before: Any) -> dict[str, Any]:
    """Return what the readings came to."""
    import numpy as np

    from mlxflow.training.profiling import STEP

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
        "growth_bytes_per_step": float(active[-1] - active[0]) / max(1, len(active) - 1),
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
