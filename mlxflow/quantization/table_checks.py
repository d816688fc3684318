"""Checks of a `[quantize]` table for contradicting keys, made when the workflow is read; imports no MLX."""

from collections.abc import Iterator
from typing import Any

import msgspec

from mlxflow.device.compute_device import parse_size, size_mistake
from mlxflow.quantization.settings import mistakes_in
from mlxflow.storage.toml_tables import Problem, toml_value


def table_problems(config: Any) -> Iterator[Problem]:
    """Yield bits and group sizes that the mode does not support, and contradicting keys."""
    for one in mistakes_in(config.default):
        advice = f"Set {one.key} = {one.usual}" + (' or mode = "affine".' if config.mode != "affine" else ".")
        yield Problem(one.key, one.value, one.expected, advice)
    if config.target_bits_per_weight and config.target_size:
        yield Problem(
            "target_size", config.target_size, "expected one budget, not two", "Remove target_bits_per_weight."
        )
    if (config.target_bits_per_weight or config.target_size) and config.mode not in ("affine", "symmetric"):
        yield Problem("mode", config.mode, "a budget needs a mode with several bits", 'Set mode = "affine".')
    yield from _budget_problems(config)
    yield from _start_problems(config)
    if config.needs_tokens and not config.token_stage:
        asking = next(iter(config.needs_tokens))
        yield Problem(asking, getattr(config, asking), "needs tokens, and data names none", 'Set data = "pretokenize".')


def follow_start(config: Any, artifacts: Any) -> Any:
    """Return a table with the settings of the variant that it starts from; written ones that differ are reported.

    Args:
        config: the table, with `start`.
        artifacts: see `mlxflow.workflow.stage.Artifacts`.
    """
    started = artifacts.table(config.start)
    if started is None or not hasattr(started, "group_size"):
        return config  # a name that is no quantize variant is reported with the files it lacks
    origin = f"starts from {config.start}, which has"
    is_written = config.mode != "affine" or "auto" not in (config.bits, config.group_size)
    for key, absent in (
        ("input", None),
        ("model", None),
        ("mode", None if is_written else "affine"),
        ("bits", "auto"),
        ("group_size", "auto"),
        ("layers", ()),
        ("dtype", "auto"),
    ):
        own, other = getattr(config, key), getattr(started, key)
        if own not in (absent, other):
            shown = toml_value(other) if isinstance(other, str | int) else "others"
            advice = f"Set {key} = {shown}." if shown != "others" else f"Remove {key}."
            artifacts.note(Problem(key, own, f"{origin} {shown}", advice))
    if problem := _untrained_scales(config.training, started.mode):
        artifacts.note(problem)
    kept = {key: getattr(started, key) for key in ("mode", "bits", "group_size", "layers", "dtype")}
    return msgspec.structs.replace(config, **kept)


def _start_problems(config: Any) -> Iterator[Problem]:
    """Yield keys that contradict a variant to start from, and scales that cannot be trained."""
    if not config.start:
        if config.method == "qat" and (problem := _untrained_scales(config.training, config.mode)):
            yield problem
        return
    if config.method != "qat":
        yield Problem("start", config.start, f"method {config.method} does not start from codes", 'Set method = "qat".')
    if config.training in ("lora", "dora"):
        advice = 'Set training = "full" or "scales", or remove start.'
        yield Problem("training", config.training, "adapters start from dense weights", advice)
    for key, expected in (
        ("target_bits_per_weight", "the bits are those of start"),
        ("target_size", "the bits are those of start"),
        ("rotations", "the weights are those of start"),
    ):
        if getattr(config, key):
            yield Problem(key, getattr(config, key), expected, f"Remove {key}.")


def _untrained_scales(training: str, mode: str) -> Problem | None:
    if training != "scales" or mode not in ("mxfp4", "mxfp8"):
        return None
    expected = f"scales of {mode} are powers of two, which are not trained"
    return Problem("training", training, expected, 'Set training = "full".')


def most_ranks(config: Any) -> int:
    """Return the most processes that can share an update of quantization-aware training; 0 for other methods."""
    return int(config.batch_size * config.grad_accum_steps) if config.method == "qat" else 0


def trains_adapters(config: Any) -> bool:
    """Return whether quantization-aware training trains adapters beside frozen weights."""
    return config.lora.shape(config.training) is not None


def _budget_problems(config: Any) -> Iterator[Problem]:
    """Yield budgets that no choice of bits can keep."""
    example = 'Write such as "200 MB".'
    if config.target_size.strip().endswith("%"):
        yield Problem("target_size", config.target_size, "expected a size in bytes", example)
    elif config.target_size and (expected := size_mistake(config.target_size)):
        yield Problem("target_size", config.target_size, expected, example)
    elif config.target_size and not parse_size(config.target_size, 0):
        yield Problem("target_size", config.target_size, "expected more than 0 bytes", example)
    least = min(config.candidate_bits)
    if 0 < config.target_bits_per_weight < least:
        expected = f"expected at least the lowest of candidate_bits = {least}"
        yield Problem("target_bits_per_weight", config.target_bits_per_weight, expected, "Change one of the two.")
