"""Checks of a `[quantize]` table for contradicting keys, made when the workflow is read; imports no MLX."""

from collections.abc import Iterator
from typing import Any

from mlxflow.device.compute_device import parse_size, size_mistake
from mlxflow.quantization.settings import mistakes_in
from mlxflow.storage.toml_tables import Problem


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
    if config.needs_tokens and not config.token_stage:
        asking = next(iter(config.needs_tokens))
        yield Problem(asking, getattr(config, asking), "needs tokens, and data names none", 'Set data = "pretokenize".')


def most_ranks(config: Any) -> int:
    """Return the most processes that can share an update of quantization-aware training; 0 for other methods."""
    return int(config.batch_size * config.grad_accum_steps) if config.method == "qat" else 0


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
