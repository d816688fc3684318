"""Measure the speed of training, and the size and quality of every model."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from mlxflow.stage import Artifacts, Context, derive_seed

VERSION = 3

#: The artifact tells about this machine; another one is another input.
DEVICE_BOUND = True

# How far the host runs ahead within a step is chance, so its peak is the most of several
_PEAK_STEPS = 4


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[benchmark]` table."""

    data: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    input: Annotated[str, Meta(description="the dense model that is trained on: a train stage")] = "train"
    models: Annotated[
        tuple[str, ...], Meta(min_length=1, description='model stages compared; "stage:*" is all variants')
    ] = ("train", "quantize:*")
    batch_sizes: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=1, description="rows in one forward pass, each timed")
    ] = (16, 32, 64)
    num_steps: Annotated[int, Meta(ge=1, description="training steps timed for each batch size")] = 100
    max_validation_rows: Annotated[int, Meta(ge=1, description="validation rows used for the perplexity")] = 256


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A model to train, models to compare, tokens for both.

    Attributes:
        models: by reference, such as "quantize:q4".
    """

    model: Path = Path()
    configs: tuple[Path, ...] = ()
    tokens: Path = Path()
    validation: Path = Path()
    models: dict[str, Path] = {}

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the models from train and quantize stages and the tokens from a pretokenize stage."""
        tokens = artifacts.folder(config.data, "data")
        trained = artifacts.folder(config.input, "input")
        references = artifacts.expand(config.models, "models")
        folders = {reference: artifacts.folder(reference, "models") for reference in references}
        return cls(
            model=trained / "model.safetensors",
            configs=tuple(folder / "config.json" for folder in dict.fromkeys([trained, *folders.values()])),
            tokens=tokens / "train.safetensors",
            validation=tokens / "validation.safetensors",
            models={reference: folder / "model.safetensors" for reference, folder in folders.items()},
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The figures."""

    report: Path = Path("report.toml")


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Time training steps at every batch size, then measure every model.

    Raises:
        SourceError: there are fewer rows than the largest batch holds.
    """
    return {
        "training": _benchmark_training(config, inputs, context),
        "models": _benchmark_models(config, inputs, context.task),
    }


def _benchmark_training(config: Config, inputs: Inputs, context: Context) -> list[dict[str, Any]]:
    import mlx.core as mx

    from mlxflow import models, packed
    from mlxflow.data.token_file import TokenFile
    from mlxflow.measurement.throughput import interleave
    from mlxflow.training.step import steps_on

    tokens = TokenFile.open(inputs.tokens)
    tokens.require_vocabulary(models.vocab_size(inputs.model.parent), f"{context.task}.input")
    rows = tokens.full_rows(max(config.batch_sizes), f"{context.task}.batch_sizes")
    steps: list[Callable[[], object]] = []
    peaks: list[int] = []
    with ExitStack() as running:
        for batch_size in config.batch_sizes:
            before = mx.get_active_memory()  # the models of the other batch sizes are still there
            model = models.load_dense(inputs.model.parent, f"{context.task}.input")
            seed = derive_seed(context.seed, context.task)
            masks = tokens.has_conversations and packed.can_mask_documents(model, tokens.vocab_size)
            steps_of = steps_on(model, rows, batch_size=batch_size, masks_documents=masks, seed=seed)
            step = running.enter_context(steps_of)
            step()  # compiles, and makes the optimizer's state
            mx.reset_peak_memory()
            for _ in range(_PEAK_STEPS):
                step()
            peaks.append(max(mx.get_active_memory(), mx.get_peak_memory()) - before)
            steps.append(step)
        timings = interleave(steps, num_rounds=config.num_steps)
    targets_per_row = tokens.targets / max(1, tokens.rows.num_rows)
    return [
        {
            "batch_size": batch_size,
            "num_steps": config.num_steps,
            "median_step_seconds": timing.median,
            "fastest_step_seconds": timing.fastest,
            "slowest_step_seconds": timing.slowest,
            "samples_per_second": batch_size / timing.median,
            "tokens_per_second": batch_size * targets_per_row / timing.median,
            "peak_memory_bytes": peak,
        }
        for batch_size, timing, peak in zip(config.batch_sizes, timings, peaks, strict=True)
    ]


def _benchmark_models(config: Config, inputs: Inputs, task: str) -> list[dict[str, Any]]:
    from mlxflow import models, packed
    from mlxflow.data.token_file import TokenFile
    from mlxflow.measurement.perplexity import measure_perplexity

    tokens = TokenFile.open(inputs.validation)
    rows = tokens.rows.head(config.max_validation_rows)
    dense_bytes = _file_bytes([inputs.model])
    measurements = []
    for reference, path in inputs.models.items():
        tokens.require_vocabulary(models.vocab_size(path.parent), f"{task}.models")
        model, _ = models.load(path.parent)
        masks = tokens.has_conversations and packed.can_mask_documents(model, tokens.vocab_size)
        measured = measure_perplexity(models.for_evaluation(model), rows, batch_size=32, masks_documents=masks)
        model_bytes = _file_bytes([path])
        measurements.append(
            {
                "model": reference,
                "model_bytes": model_bytes,
                "compression_ratio": dense_bytes / model_bytes,
                "perplexity": measured.perplexity,
                "perplexity_standard_error": measured.standard_error,
                "validation_tokens": measured.tokens,
            }
        )
    return measurements


def _file_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
