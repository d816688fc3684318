"""Requests for the work of a quantization, from a `[quantize]` table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxflow.device.compute_device import parse_size
from mlxflow.quantization.aware_training import AwareTraining
from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.dense_model import TokenPair
from mlxflow.quantization.quality import QualityLimits
from mlxflow.quantization.quantization_request import QuantizationRequest, StartRequest
from mlxflow.storage.run_context import Context
from mlxflow.storage.toml_tables import toml_value
from mlxflow.training import length
from mlxflow.training.run import describe
from mlxflow.training.settings import Recomputation, SettingNames, TrainingSettings


def request_of(
    config: Any, context: Context, tokens: TokenPair | None, *, start: Sequence[Path], memory_key: str
) -> QuantizationRequest:
    """Return the settings of the quantization from the table.

    Args:
        config: the table.
        context: of the stage.
        tokens: of its pretokenize stage.
        start: files of the stage that it starts from; empty for none.
        memory_key: the setting of the memory limit, for messages.
    """
    key = "target_size" if config.target_size else "target_bits_per_weight"
    budget = BudgetRequest(
        config.target_bits_per_weight,
        parse_size(config.target_size, 0) if config.target_size else 0,
        config.candidate_bits,
        config.candidate_group_sizes,
        setting=f"{context.task}.{key} = {toml_value(getattr(config, key))}",
        key=context.task,
    )
    training = None
    if config.method == "qat" and tokens:
        training = aware_training(config, context, tokens.train.rows.num_rows, memory_key=memory_key)
    return QuantizationRequest(
        config.method,
        config.default,
        [layer.rule for layer in config.layers],
        config.calibration_rows,
        budget if config.has_budget else None,
        training,
        QualityLimits(config.max_validation_rows, config.max_perplexity_increase, config.max_kl),
        config.batch_size,
        config.token_stage,
        _start_request(config, context, start),
        config.block_steps,
        config.scale_steps,
        config.rotations,
    )


def _start_request(config: Any, context: Context, files: Sequence[Path]) -> StartRequest | None:
    return StartRequest(files, config.start, f'{context.task}.start = "{config.start}"') if files else None


def aware_training(config: Any, context: Context, num_rows: int, *, memory_key: str) -> AwareTraining:
    """Return the quantization-aware training of the table.

    Args:
        config: the table.
        context: of the stage.
        num_rows: of the training file.
        memory_key: the setting of the memory limit, for messages.
    """
    adjustable = frozenset(("checkpointing",))
    names = SettingNames.of_stage(context.task, config.token_stage, memory_key, adjustable=adjustable)
    config = length.fitted(config, num_rows, key=names.of("batch_size"))
    description = describe(msgspec.to_builtins(config), names, context)
    return AwareTraining(
        written_settings(config, num_rows),
        config.learning_rate,
        config.kernels,
        config.distill,
        _trains(config),
        names,
        description,
    )


def _trains(config: Any) -> Literal["weights", "scales", "all"]:
    """Return what is trained: with codes to start from, their grids as well as the weights."""
    if config.training == "scales":
        return "scales"
    return "all" if config.start else "weights"


def written_settings(config: Any, num_rows: int) -> TrainingSettings:
    """Return the training settings in the table; `quantization.aware_training.suited` completes them.

    Args:
        config: the table.
        num_rows: of the training file.
    """
    return TrainingSettings(
        adapters=config.lora.shape(config.training) or "none",
        num_steps=length.planned_steps(config, num_rows),
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        checkpoint_every=Recomputation.of(config.checkpointing).every,
        checkpoint_segment=Recomputation.of(config.checkpointing).segment,
        deterministic=config.deterministic,
        max_validation_rows=config.max_validation_rows,
    )
