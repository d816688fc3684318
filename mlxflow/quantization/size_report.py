"""The figures of a quantization for the report: sizes of the written model and of each layer."""

from mlxflow.quantization.job import QuantizationResult
from mlxflow.quantization.streaming_export import LayerFacts
from mlxflow.report.stage_reports.quantize import BlockFigures, LayerFigures, QuantizeReport, TuningFigures


def report_of(method: str, result: QuantizationResult, file_bytes: int) -> QuantizeReport:
    """Return the figures for the report, with the sizes of the written model.

    Args:
        method: of quantization.
        result: the result of the job.
        file_bytes: of `model.safetensors`.
    """
    plan, exported, training, tuned = result.plan, result.exported, result.training, result.tuned
    return QuantizeReport(
        method=method,
        mode=plan.default.mode,
        bits=plan.default.bits,
        group_size=plan.default.group_size,
        parameters=exported.parameters,
        bits_per_weight=8 * exported.num_bytes / exported.parameters,
        dense_bits_per_weight=8 * exported.dense_bytes / exported.parameters,
        model_bytes=file_bytes,
        compression_ratio_fp32=4 * exported.parameters / file_bytes,
        compression_ratio_bf16=2 * exported.parameters / file_bytes,
        quantized_layers=tuple(plan.layers),
        dense_layers=(*plan.skipped, *plan.undivided),
        layers=tuple(_layer_figures(layer) for layer in exported.layers),
        layers_toml=None if result.budget is None else plan.layers_toml(),
        budget=result.budget,
        kernels=tuple(training.kernels) if training else None,
        training=training.figures if training else None,
        blocks=tuple(
            BlockFigures(
                path=one.path, error_before_training=one.before, error_after_training=one.after, error=one.output
            )
            for one in result.blocks
        ),
        tuning=tuned and TuningFigures(steps=tuned.num_steps, first_loss=tuned.first_loss, last_loss=tuned.last_loss),
        rotation=result.rotation,
        teacher=result.teacher,
        start=result.start,
        calibration_text=None if result.texts is None else result.texts.calibration,
        quality=result.quality,
        warnings=tuple(result.warnings),
        run=training.run if training else None,
    )


def _layer_figures(layer: LayerFacts) -> LayerFigures:
    setting = layer.setting
    return LayerFigures(
        path=layer.path,
        shape=tuple(layer.shape),
        mode=setting.mode if setting else "dense",
        bits=setting.bits if setting else 0,
        group_size=setting.group_size if setting else 0,
        bytes=layer.num_bytes,
        parameters=layer.parameters,
        bits_per_weight=8 * layer.num_bytes / layer.parameters,
        relative_error=layer.relative_error,
    )
