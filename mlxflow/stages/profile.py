"""Measure the memory of real training steps."""

from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from mlxflow.stage import Artifacts, Context, derive_seed

VERSION = 2

#: The artifact tells about this machine; another one is another input.
DEVICE_BOUND = True


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[profile]` table."""

    input: Annotated[str, Meta(description="the dense model: a train stage")] = "train"
    data: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[int, Meta(ge=1, description="training steps measured")] = 20
    batch_size: Annotated[int, Meta(ge=1, description="rows in one forward pass")] = 32


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model and tokens to train it on."""

    config: Path = Path()
    model: Path = Path()
    tokens: Path = Path()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage and the tokens from a pretokenize stage."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            config=folder / "config.json",
            model=folder / "model.safetensors",
            tokens=artifacts.folder(config.data, "data") / "train.safetensors",
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The figures and the reading after each step."""

    timeline: Path = Path("timeline.safetensors")
    report: Path = Path("report.toml")


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train a copy of the model for some steps and read the memory at every step's ends.

    Raises:
        SourceError: there are fewer rows than one batch holds.
    """
    import mlx.core as mx

    from mlxflow import artifact, models, packed
    from mlxflow.data.token_file import TokenFile
    from mlxflow.measurement.memory import MemoryProfiler, profile_memory
    from mlxflow.training.step import steps_on

    profiler = MemoryProfiler()
    before = profiler.read()
    with profile_memory(profiler, "load_model"):
        model = models.load_dense(inputs.model.parent, f"{context.task}.input")
    seed = derive_seed(context.seed, context.task)
    tokens = TokenFile.open(inputs.tokens)
    tokens.require_vocabulary(models.vocab_size(inputs.model.parent), f"{context.task}.input")
    rows = tokens.full_rows(config.batch_size, f"{context.task}.batch_size")
    masks = tokens.has_conversations and packed.can_mask_documents(model, tokens.vocab_size)
    with steps_on(model, rows, batch_size=config.batch_size, masks_documents=masks, seed=seed) as step:
        with profile_memory(profiler, "first_step"):
            step()  # compiles, and makes the optimizer's state
        for _ in range(config.num_steps):
            with profile_memory(profiler, "training_step"):
                step()
    phases = profiler.phases[2:]
    ends = [phase.end for phase in phases]
    artifact.write_arrays(
        outputs.timeline,
        {name: _column([getattr(end, name) for end in ends]) for name in ends[0]._fields},
        artifact.provenance_metadata(context.provenance),
    )
    seconds = sorted(phase.end.seconds - phase.begin.seconds for phase in phases)
    return {
        "batch_size": config.batch_size,
        "num_steps": config.num_steps,
        "model_bytes": models.num_bytes(model),
        "memory_limit_bytes": context.memory_limit_bytes,
        "active_memory_bytes": ends[-1].active_memory_bytes,
        "peak_memory_bytes": max(end.peak_memory_bytes for end in ends),
        "cache_memory_bytes": max(end.cache_memory_bytes for end in ends),
        "rss_before_bytes": before.rss_bytes,
        "rss_bytes": max(end.rss_bytes for end in ends),
        "available_bytes": min(end.available_bytes for end in ends),
        "growth_bytes_per_step": (ends[-1].active_memory_bytes - ends[0].active_memory_bytes) / max(1, len(ends) - 1),
        "median_step_seconds": seconds[len(seconds) // 2],
        "phases": [
            {"name": phase.name, "peak_memory_bytes": phase.end.peak_memory_bytes, "growth_bytes": phase.growth_bytes}
            for phase in profiler.phases[:3]
        ],
        "run": {"mlx_device_info": {key: str(value) for key, value in mx.device_info().items()}},
    }


def _column(values: list[float]) -> Any:
    """Return the values in a type that MLX reads too: whole numbers as int64, others as float32."""
    import numpy as np

    return np.array(values, np.float32 if isinstance(values[0], float) else np.int64)
