"""Size, generation speed and perplexity of the models of a workflow, as rows of the benchmark's report."""

import gc
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlxflow.benchmarking.generation_speed import GenerationSpeed, measure_generation
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.data.token_file import TokenFile
from mlxflow.device.memory_errors import out_of_memory_bytes, settle, shortage
from mlxflow.models import fp32_on_cpu, model_folder, trial_calls
from mlxflow.ops import document_mask
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, PrefillFigures
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.storage import config_json, layout, report_structs
from mlxflow.storage.model_files import stored_bytes
from mlxflow.training.model_artifact import measure_model

# Timed rounds of generation, and tokens generated in each
_GENERATION_ROUNDS, _DECODE_TOKENS = 5, 32

# Models whose total size is a smaller share of the memory limit are held together; larger ones are loaded for each turn
_HELD_SHARE = 0.25

# Tokens of the longest prompt, and ids in prompts, where no token file says them
_PROMPT_TOKENS, _PROMPT_IDS = 512, 1000

# Validation rows that are used even if the time is over
_FEWEST_ROWS = 8

# Validation rows in one forward pass
_EVAL_BATCH = 32


class ComparedModels(NamedTuple):
    """The models to measure, with the settings of the measurement.

    Attributes:
        weights: `model.safetensors` of each, by reference such as "quantize:q4".
        dense: `model.safetensors` of the model that sizes are compared with; None for none on this machine.
        validation: the token file; None for no perplexity.
        prompt_lengths: in tokens; empty for a quarter, half and all of the context.
        max_rows: the most validation rows used for the perplexity.
        memory_limit_bytes: of MLX.
        key: the setting that names the models, for messages.
    """

    weights: Mapping[str, Path]
    dense: Path | None
    validation: Path | None
    prompt_lengths: tuple[int, ...]
    max_rows: int
    memory_limit_bytes: int
    key: str

    def only(self, references: Set[str]) -> "ComparedModels":
        """Return a selection of the models.

        Args:
            references: of the models; unknown ones are ignored.
        """
        return self._replace(weights={name: path for name, path in self.weights.items() if name in references})

    def measure(self, budget: Budget) -> tuple[ModelRow, ...]:
        """Return a row for each model; for one out of memory only the size and the error.

        Args:
            budget: of time.

        Raises:
            ArtifactError: a model's vocabulary lacks tokens, or a model cannot be opened.
        """
        speeds = self._generation(budget)
        most = self._rows_in_time(speeds, budget)
        rows = []
        for number, ((reference, path), speed) in enumerate(zip(self.weights.items(), speeds, strict=True)):
            budget.progress("perplexity of model", number, len(speeds), 0.0)
            if isinstance(speed, RuntimeError):
                rows.append(self._lacking(reference, speed))
                continue
            try:
                row = self._measure_model(reference, path, speed, most)
                settle()
            except RuntimeError as error:
                row = self._lacking(reference, error)
                settle(drops=True)
            rows.append(row)
            gc.collect()
            mx.clear_cache()
        return tuple(rows)

    def measure_speeds(self, budget: Budget) -> tuple[ModelRow, ...]:
        """Return a row with only the speeds for each model; none for a model out of memory.

        Args:
            budget: of time.
        """
        if not self.weights:
            return ()
        return tuple(
            _speed_row(reference, speed)
            for reference, speed in zip(self.weights, self._generation(budget), strict=True)
            if not isinstance(speed, RuntimeError)
        )

    def dense_row(self, rows: Iterable[ModelRow]) -> ModelRow | None:
        """Return the row of the dense model; None if it is not measured.

        Args:
            rows: of `measure`.
        """
        return next((row for row in rows if self.weights[row.model] == self.dense), None)

    def _lacking(self, reference: str, error: RuntimeError) -> ModelRow:
        """Return the row of a model that does not fit into the memory; raise any other error."""
        needed = out_of_memory_bytes(error)
        if needed is None:
            raise error
        message = shortage(needed, self.memory_limit_bytes)
        return ModelRow(model=reference, model_bytes=stored_bytes(self.weights[reference]), error=message)

    def _generation(self, budget: Budget) -> list[GenerationSpeed | RuntimeError]:
        """Return the generation speed of each model, or the error; small models are held in memory together."""
        length, vocab_size = self._prompts()
        whole = sum(stored_bytes(path) for path in self.weights.values())
        return measure_generation(
            [partial(_load_to_generate, path.parent, vocab_size=vocab_size) for path in self.weights.values()],
            prompt_lengths=sorted(set(self.prompt_lengths or (max(1, length // 4), max(1, length // 2), length))),
            decode_tokens=min(_DECODE_TOKENS, length),
            num_rounds=_GENERATION_ROUNDS,
            vocab_size=vocab_size,
            holds=whole < _HELD_SHARE * self.memory_limit_bytes,
            budget=budget,
        )

    def _prompts(self) -> tuple[int, int]:
        """Return the tokens of the longest prompt, and the number of token ids that prompts may have.

        Raises:
            ArtifactError: a model's vocabulary lacks tokens.
        """
        folders = [path.parent for path in self.weights.values()]
        sizes = [model_folder.vocab_size(folder) for folder in folders]
        if self.validation is None:
            positions = (config_json.num_positions(config_json.read(folder)) for folder in folders)
            return min(_PROMPT_TOKENS, *positions), min(_PROMPT_IDS, *sizes)
        tokens = TokenFile.open(self.validation)
        for size in sizes:
            tokens.require_vocabulary(size, self.key)
        return tokens.context_length, tokens.vocab_size

    def _rows_in_time(self, speeds: Sequence[GenerationSpeed | RuntimeError], budget: Budget) -> int:
        """Return the number of validation rows that the time allows for all models, estimated from prefill."""
        if self.validation is None:
            return 0
        length = TokenFile.open(self.validation).context_length
        fits = [speed for speed in speeds if not isinstance(speed, RuntimeError)]
        seconds_a_row = sum(2 * length / list(speed.prefill.values())[-1].median for speed in fits)
        budget.announce(f"perplexity of {len(fits)} models", seconds_a_row * self.max_rows)
        if not seconds_a_row or budget.left == float("inf"):
            return self.max_rows
        return max(_FEWEST_ROWS, min(self.max_rows, int(budget.left / seconds_a_row)))

    def _measure_model(self, reference: str, path: Path, speed: GenerationSpeed, most_rows: int) -> ModelRow:
        sizes = self._sizes(reference, path)
        if self.validation is None:
            return msgspec.structs.replace(_speed_row(reference, speed), **sizes)
        tokens = TokenFile.open(self.validation)
        model = _load(path.parent, vocab_size=tokens.vocab_size)
        masks = document_mask.masks_conversations(model, tokens)
        rows = tokens.rows.head(most_rows)
        measured = measure_model(model, rows, batch_size=_EVAL_BATCH, masks_documents=masks)
        if not math.isfinite(measured.perplexity):
            error = "its perplexity is not a number. Look for weights that are not finite"
            return ModelRow(model=reference, model_bytes=sizes["model_bytes"], error=error)
        return msgspec.structs.replace(
            _speed_row(reference, speed),
            **sizes,
            perplexity=measured.perplexity,
            perplexity_standard_error=measured.standard_error,
            validation_tokens=measured.tokens,
            validation_rows=rows.num_rows,
            has_fewer_rows=most_rows < min(self.max_rows, tokens.rows.num_rows),
        )

    def _sizes(self, reference: str, path: Path) -> dict[str, Any]:
        """Return the figures of a row about the size of a model, compared with the dense one or with itself."""
        dense = self.dense or path
        model_bytes, dense_bytes = (stored_bytes(one) for one in (path, dense))
        parameters = model_folder.num_parameters(_load(dense.parent))
        return {
            "model_bytes": model_bytes,
            "compression_ratio": dense_bytes / model_bytes,
            "compression_ratio_fp32": 4 * parameters / model_bytes,
            "compression_ratio_bf16": 2 * parameters / model_bytes,
            "asked_bits_per_weight": _asked_bits(reference, path),
        }


def _load(folder: Path, *, vocab_size: int = 0) -> nn.Module:
    """Return a model with lazy weights, to be given so many ids; reading them raises an error if they do not fit."""
    model, config = model_folder.load(folder, lazy=True)
    trial_calls.require_generation(model, config, str(folder / "config.json"), vocab_size=vocab_size)
    return model


def _load_to_generate(folder: Path, *, vocab_size: int) -> nn.Module:
    """Return a model as `mlxflow generate` runs it: see `models.fp32_on_cpu`."""
    model = _load(folder, vocab_size=vocab_size)
    fp32_on_cpu.widen(model)
    return model


def _speed_row(reference: str, speed: GenerationSpeed) -> ModelRow:
    """Return the row of a model with only its speeds."""
    return ModelRow(
        model=reference,
        prefill=tuple(_prefill_figures(tokens, speed) for tokens in speed.prefill),
        decode_tokens_per_second=speed.decode.median,
        low_decode_tokens_per_second=speed.decode.low,
        high_decode_tokens_per_second=speed.decode.high,
        low_relative_decode_tokens_per_second=speed.relative_decode.low,
        high_relative_decode_tokens_per_second=speed.relative_decode.high,
        machine_seconds=speed.machine_seconds,
        peak_memory_bytes=speed.peak_memory_bytes,
    )


def _prefill_figures(tokens: int, speed: GenerationSpeed) -> PrefillFigures:
    rate, relative = speed.prefill[tokens], speed.relative_prefill[tokens]
    return PrefillFigures(
        prompt_tokens=tokens,
        tokens_per_second=rate.median,
        low_tokens_per_second=rate.low,
        high_tokens_per_second=rate.high,
        low_relative_tokens_per_second=relative.low,
        high_relative_tokens_per_second=relative.high,
    )


def _asked_bits(reference: str, path: Path) -> float | None:
    """Return the bits per weight that the plan of a quantized model requested; None for a dense one."""
    if reference.partition(":")[0] != "quantize":
        return None
    report, advice = path.with_name(layout.REPORT), "Build the model again."
    layers = report_structs.read(report, QuantizeReport, advice=advice).figures.layers
    parameters = sum(layer.parameters for layer in layers)
    if not parameters:
        return None
    return sum(layer.bits_per_weight * layer.parameters for layer in layers) / parameters
