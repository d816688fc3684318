"""Measure the speed of training, and the size and quality of every model."""

import json
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import msgspec
from msgspec import Meta

from mlxflow.errors import ArtifactError
from mlxflow.stages import benchmark_methods
from mlxflow.storage import layout
from mlxflow.storage.model_files import ADAPTERS
from mlxflow.system import terminal
from mlxflow.workflow import products
from mlxflow.workflow.config import MAX_ROWS, MAX_SIZE, MAX_STEPS, limit
from mlxflow.workflow.stage import Artifacts, Beside, Context, derive_seed

VERSION = 6

T = TypeVar("T")

#: The artifact depends on this machine; another one makes it stale.
DEVICE_BOUND = True

# Rounds in which generation is timed, and tokens written in each
_GENERATION_ROUNDS, _DECODE_TOKENS = 5, 32
# Models whose files together take less of the memory limit are held together; larger ones are loaded for each turn
_HELD_SHARE = 0.25
# Of `max_seconds`, when each part should be done; the rest is for where a step's time goes
_SHARES = {"training": 0.5, "convergence": 0.65, "models": 0.95}
# Validation rows that are looked at though the time is over
_FEWEST_ROWS = 8


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[benchmark]` table."""

    data: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    input: Annotated[str, Meta(description="the dense model that is trained on: a train stage")] = "train"
    models: Annotated[
        tuple[str, ...], Meta(min_length=1, description='model stages compared; "stage:*" is all variants')
    ] = ("train", "quantize:*")
    batch_sizes: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_ROWS)], ...],
        Meta(min_length=1, description="rows in one forward pass, each timed"),
    ] = (16, 32, 64)
    num_steps: Annotated[
        int, Meta(ge=1, le=MAX_STEPS, description="training steps timed of each way at each batch size")
    ] = 100
    convergence_steps: Annotated[
        int,
        Meta(
            ge=0, le=MAX_STEPS, description="steps that a new model trains, the naive way and the workflow's; 0: none"
        ),
    ] = 100
    prompt_lengths: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_SIZE)], ...],
        Meta(description="tokens of the prompts that models read; empty: a quarter, half and all of the context"),
    ] = ()
    max_validation_rows: Annotated[
        int, Meta(ge=1, le=MAX_ROWS, description="validation rows used for the perplexity")
    ] = 256
    max_seconds: Annotated[
        float,
        limit(
            1e9, "after so many rounds, steps and validation rows get fewer, down to a few of each; 0 or inf: no bound"
        ),
    ] = 900.0
    baseline: Annotated[str, Meta(description="the report.toml of an earlier run that this one is held against")] = ""
    max_regression: Annotated[
        float,
        limit(
            1e6, "share by which a figure may be worse than the baseline's, beyond the noise; inf: any", unlimited=1e6
        ),
    ] = 0.05


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A model to train, models to compare, tokens for both.

    Attributes:
        beside: what lies beside each of the models, such as adapters.
        models: by reference, such as "quantize:q4".
    """

    model: Path = Path()
    configs: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    tokens: Path = Path()
    validation: Path = Path()
    models: dict[str, Path] = {}
    baseline: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the models from train and quantize stages and the tokens from a pretokenize stage."""
        tokens = artifacts.folder(config.data, "data")
        trained = artifacts.folder(config.input, "input")
        references = artifacts.expand(config.models, "models")
        folders = {reference: artifacts.folder(reference, "models") for reference in references}
        every = dict.fromkeys([trained, *folders.values()])
        return cls(
            model=trained / "model.safetensors",
            configs=tuple(folder / "config.json" for folder in every),
            beside=tuple(Beside(folder) for folder in every),
            tokens=tokens / "train.safetensors",
            validation=tokens / "validation.safetensors",
            models={reference: folder / "model.safetensors" for reference, folder in folders.items()},
            baseline=artifacts.files((config.baseline,), "baseline") if config.baseline else (),
        )


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The figures."""

    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table as it is; note more tokens in a forward pass, or in all steps, than a machine can compute."""
    if not (row := products.rows_of(artifacts, config.data)):
        return config
    one_pass: dict[str, int | tuple[int, ...]] = {"batch_sizes": config.batch_sizes, **row}
    products.note_excess(artifacts, (one_pass, products.MAX_PASS_TOKENS, "tokens in a forward pass"))
    if not config.max_seconds:
        for key in ("num_steps", "convergence_steps"):
            steps: dict[str, int | tuple[int, ...]] = {key: getattr(config, key), **one_pass}
            products.note_excess(artifacts, (steps, products.MAX_TRAINING_TOKENS, "tokens in all"))
    return config


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Time training by every recipe, train a new model for a while, then measure every model.

    Raises:
        ArtifactError: the dense model's stage does not say how it was trained, or the baseline is of another version.
        SourceError: there are fewer rows than the largest batch holds.
        StageError: a figure is worse than the baseline's.
    """
    from mlxflow.benchmarking.bottleneck import advise
    from mlxflow.benchmarking.report_comparison import markdown_of_report
    from mlxflow.benchmarking.targets import keep_promises
    from mlxflow.benchmarking.time_budget import Budget

    baseline = read_benchmark(inputs.baseline[0]) if inputs.baseline else None
    budget = Budget(config.max_seconds, task=context.task)
    suite = _suite(config, inputs, context, budget)
    budget.begin(_SHARES["training"])
    report: dict[str, Any] = {"version": VERSION, "device": _device(context), **suite.measure()}
    if config.convergence_steps:
        budget.begin(_SHARES["convergence"])
        report["convergence"] = _if_it_fits(lambda: suite.converge(config.convergence_steps)) or []
    budget.begin(_SHARES["models"])
    report["models"] = _benchmark_models(config, inputs, context, budget)
    budget.begin(1.0)
    own = suite.own_batch_size
    parts = _if_it_fits(suite.take_apart)
    shares = {name: seconds / sum(parts) for name, seconds in parts._asdict().items()} if parts else {}
    report["bottleneck"] = {f"{name}_share": share for name, share in shares.items()}
    report["bottleneck"] |= _if_it_fits(lambda: suite.against_ceilings(report, _dense_row(report, inputs))) or {}
    if shares:
        tables = {"training_table": config.input, "tokens_table": config.data}
        report["bottleneck"]["advice"] = advise(shares, report["training"], own, **tables)
    report["promises"] = keep_promises(report["training"], report["models"], shares.get("data"), own)
    if lowered := list(benchmark_methods.lowered(report, config)):
        report["lowered"] = lowered
        terminal.say(*(f"{context.task}: {line}" for line in lowered))
    terminal.write(markdown_of_report(report))
    if baseline is not None:

        def again(names: Set[str]) -> dict[str, Any]:
            budget = Budget(config.max_seconds / benchmark_methods.REPETITIONS, task=context.task)
            suite = _suite(config, inputs, context, budget)
            timed: dict[str, Any] = suite.measure(only=names)
            few = {reference: path for reference, path in inputs.models.items() if reference in names}
            return timed | {"models": _speeds(config, inputs, context, budget, few)}

        report["comparison"] = benchmark_methods.hold_against(baseline, report, again, config, context)
    return report


def _if_it_fits(compute: Callable[[], T]) -> T | None:
    """Return what is computed; None, and a word in the terminal, where the memory does not suffice."""
    from mlxflow.training.step import out_of_memory_bytes

    try:
        return compute()
    except RuntimeError as error:
        if out_of_memory_bytes(error) is None:
            raise
        terminal.say(f"benchmark: left out, it does not fit into the memory ({error})")
        return None


def read_benchmark(path: Path) -> dict[str, Any]:
    """Return a benchmark's report.

    Raises:
        ArtifactError: it is missing, damaged, none, or of another version.
    """
    from mlxflow.storage import report_checks, report_files

    report = report_files.read_report(path)
    if "training" not in report or "models" not in report:
        raise ArtifactError(f"{path}: no benchmark's report (it has no training and models). Name one.")
    if report.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: version = {report.get('version', 'none')}: expected {VERSION}. "
            "Measure it again with this version of mlxflow: doit benchmark"
        )
    return report_checks.read(path, report_checks.Benchmarked, "benchmark")


def _suite(config: Config, inputs: Inputs, context: Context, budget: Any) -> Any:
    from mlxflow.benchmarking.suite import Suite
    from mlxflow.data.token_file import TokenFile
    from mlxflow.models import model_folder
    from mlxflow.training.settings import SettingNames, read_settings

    tokens = TokenFile.open(inputs.tokens)
    folder, key = inputs.model.parent, f"{context.task}.input"
    tokens.require_vocabulary(model_folder.vocab_size(folder), key)
    report = folder / layout.REPORT
    settings = read_settings(report, shown=str(report.relative_to(context.root)), task=config.input, key=key)
    tokens.full_rows(max(config.batch_sizes) * settings.grad_accum_steps, f"{context.task}.batch_sizes")
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    seed = derive_seed(context.seed, context.task)
    has_adapters = settings.adapter_shape is not None
    return Suite(
        load=partial(model_folder.load_for_steps, folder, key, trains_adapters=has_adapters),
        build=lambda: model_folder.build(model_config, seed=seed, code=folder),
        tokens=tokens,
        settings=settings,
        names=SettingNames(config.input, f"{config.data}.context_length", "workflow.memory_limit"),
        batch_sizes=config.batch_sizes,
        num_steps=config.num_steps,
        memory_limit_bytes=context.memory_limit_bytes,
        seed=seed,
        budget=budget,
    )


def _device(context: Context) -> dict[str, str]:
    from mlxflow.device import compute_device

    return {"kind": context.device, "name": compute_device.name(), "processor": compute_device.processor()}


def _benchmark_models(config: Config, inputs: Inputs, context: Context, budget: Any) -> list[dict[str, Any]]:
    from mlxflow.training.step import out_of_memory_bytes

    def lacking(reference: str, error: RuntimeError) -> dict[str, Any]:
        needed = out_of_memory_bytes(error)
        if needed is None:
            raise error
        said = f"out of memory: {needed:,} more bytes needed, memory limit {context.memory_limit_bytes:,}"
        return {"model": reference, "model_bytes": _stored_bytes(inputs.models[reference]), "error": said}

    rows = []
    speeds = _generation(config, inputs, context, budget, inputs.models)
    most = _validation_rows(config, inputs, speeds, budget)
    for number, ((reference, path), speed) in enumerate(zip(inputs.models.items(), speeds, strict=True)):
        budget.progress("perplexity of model", number, len(speeds), 0.0)
        if isinstance(speed, RuntimeError):
            rows.append(lacking(reference, speed))
            continue
        try:
            rows.append({"model": reference, **_benchmark_model(path, speed, most, config.max_validation_rows, inputs)})
        except RuntimeError as error:
            rows.append(lacking(reference, error))
        _give_back()
    return rows


def _give_back() -> None:
    import gc

    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _generation(config: Config, inputs: Inputs, context: Context, budget: Any, chosen: Mapping[str, Path]) -> list[Any]:
    """Return how fast each model generates, or why it cannot; all are held together where they are small."""
    from mlxflow.benchmarking.generation_speed import measure_generation
    from mlxflow.data.token_file import TokenFile
    from mlxflow.models import model_folder

    tokens = TokenFile.open(inputs.validation)
    for path in chosen.values():
        tokens.require_vocabulary(model_folder.vocab_size(path.parent), f"{context.task}.models")
    length = tokens.context_length
    whole = sum(_stored_bytes(path) for path in chosen.values())
    return measure_generation(
        [partial(_load, path.parent) for path in chosen.values()],
        prompt_lengths=sorted(set(config.prompt_lengths or (max(1, length // 4), max(1, length // 2), length))),
        decode_tokens=min(_DECODE_TOKENS, length),
        num_rounds=_GENERATION_ROUNDS,
        vocab_size=tokens.vocab_size,
        holds=whole < _HELD_SHARE * context.memory_limit_bytes,
        budget=budget,
    )


def _speeds(
    config: Config, inputs: Inputs, context: Context, budget: Any, chosen: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Return rows of models with their speeds alone."""
    if not chosen:
        return []
    speeds = _generation(config, inputs, context, budget, chosen)
    return [
        {"model": reference, **_speed_row(speed)}
        for reference, speed in zip(chosen, speeds, strict=True)
        if not isinstance(speed, RuntimeError)
    ]


def _speed_row(speed: Any) -> dict[str, Any]:
    return {
        "prefill": [
            {"prompt_tokens": tokens, **_rate("", rate, speed.relative_prefill[tokens])}
            for tokens, rate in speed.prefill.items()
        ],
        **_rate("decode_", speed.decode, speed.relative_decode),
        "machine_seconds": speed.machine_seconds,
        "peak_memory_bytes": speed.peak_memory_bytes,
    }


def _validation_rows(config: Config, inputs: Inputs, speeds: Sequence[Any], budget: Any) -> int:
    """Return how many validation rows all models have time for: a row is one prompt of all the context, and a loss."""
    from mlxflow.data.token_file import TokenFile

    length = TokenFile.open(inputs.validation).context_length
    fits = [speed for speed in speeds if not isinstance(speed, RuntimeError)]
    seconds_a_row = sum(2 * length / list(speed.prefill.values())[-1].median for speed in fits)
    budget.announce(f"perplexity of {len(fits)} models", seconds_a_row * config.max_validation_rows)
    if not seconds_a_row or budget.left == float("inf"):
        return config.max_validation_rows
    return max(_FEWEST_ROWS, min(config.max_validation_rows, int(budget.left / seconds_a_row)))


def _load(folder: Path) -> Any:
    """Return a model, its weights still on the disk: reading them raises if they do not fit."""
    from mlxflow.models import model_folder

    return model_folder.load(folder, lazy=True)[0]


def _benchmark_model(path: Path, speed: Any, most_rows: int, wanted_rows: int, inputs: Inputs) -> dict[str, Any]:
    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.perplexity import measure_perplexity
    from mlxflow.models import model_folder, quantized_layers
    from mlxflow.ops import document_mask

    tokens = TokenFile.open(inputs.validation)
    model = _load(path.parent)
    masks = tokens.has_conversations and document_mask.can_mask_documents(model, tokens.vocab_size)
    rows = tokens.rows.head(most_rows)
    measured = measure_perplexity(quantized_layers.for_evaluation(model), rows, batch_size=32, masks_documents=masks)
    model_bytes, dense_bytes = (_stored_bytes(one) for one in (path, inputs.model))
    parameters = model_folder.num_parameters(_load(inputs.model.parent))
    return {
        "model_bytes": model_bytes,
        "compression_ratio": dense_bytes / model_bytes,
        "compression_ratio_fp32": 4 * parameters / model_bytes,
        "compression_ratio_bf16": 2 * parameters / model_bytes,
        **_asked_bits(path),
        **_speed_row(speed),
        "perplexity": measured.perplexity,
        "perplexity_standard_error": measured.standard_error,
        "validation_tokens": measured.tokens,
        "validation_rows": rows.num_rows,
        "has_fewer_rows": most_rows < min(wanted_rows, tokens.rows.num_rows),
    }


def _asked_bits(path: Path) -> dict[str, float]:
    """Return the bits a weight that the plan of a quantized model asked for; nothing for a dense one."""
    from mlxflow.storage import report_files

    layers = report_files.read_report(path.with_name(layout.REPORT)).get("layers", [])
    parameters = sum(layer["parameters"] for layer in layers)
    if not parameters:
        return {}
    return {
        "asked_bits_per_weight": sum(layer["bits_per_weight"] * layer["parameters"] for layer in layers) / parameters
    }


def _stored_bytes(path: Path) -> int:
    """Return the bytes of a model's weights on the disk, those of adapters beside them included."""
    beside = path.with_name(ADAPTERS[0])
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def _rate(prefix: str, rate: Any, relative: Any) -> dict[str, float]:
    name = f"{prefix}tokens_per_second"
    report = {name: rate.median, f"low_{name}": rate.low, f"high_{name}": rate.high}
    return report | {f"low_relative_{name}": relative.low, f"high_relative_{name}": relative.high}


def _dense_row(report: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Return the row of the model that is trained on, if it is one of those compared."""
    return next((row for row in report["models"] if inputs.models[row["model"]] == inputs.model), {})
