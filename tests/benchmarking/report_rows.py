"""Rows of a benchmark's report with given figures, for the tests of what is computed from them."""

from typing import Any

from mlxflow.report.stage_reports.benchmark_rows import ModelRow, PrefillFigures, TrainingRow


def training_row(
    speed: float, *, name: str = "workflow", batch_size: int = 8, spread: float = 0.02, peak: int = 1000, **figures: Any
) -> TrainingRow:
    """Return a timed row.

    Args:
        speed: tokens per second.
        name: of the row.
        batch_size: of the row.
        spread: half of the speed's interval, as a share of it.
        peak: bytes.
        figures: others.
    """
    return TrainingRow(
        name=name,
        batch_size=batch_size,
        num_steps=20,
        median_step_seconds=1.0,
        low_step_seconds=1.0,
        high_step_seconds=1.0,
        samples_per_second=float(batch_size),
        tokens_per_second=speed,
        low_tokens_per_second=speed * (1 - spread),
        high_tokens_per_second=speed * (1 + spread),
        peak_memory_bytes=peak,
        data_wait_share=0.0,
        **figures,
    )


def failed_row(name: str, error: str = "does not fit", *, batch_size: int = 8) -> TrainingRow:
    return TrainingRow(name=name, batch_size=batch_size, error=error)


def model_row(name: str = "quantize:q4", **figures: Any) -> ModelRow:
    """Return the row of a model that was measured; figures may be given."""
    usual: dict[str, Any] = {
        "model_bytes": 500,
        "compression_ratio": 3.0,
        "compression_ratio_fp32": 6.0,
        "decode_tokens_per_second": 10.0,
        "low_decode_tokens_per_second": 9.0,
        "high_decode_tokens_per_second": 11.0,
        "prefill": (
            PrefillFigures(
                prompt_tokens=16, tokens_per_second=10.0, low_tokens_per_second=9.0, high_tokens_per_second=11.0
            ),
        ),
        "peak_memory_bytes": 2000,
        "perplexity": 20.0,
        "perplexity_standard_error": 0.1,
    }
    return ModelRow(model=name, **(usual | figures))
