"""The figures of a quantize stage in report.toml."""

from mlxflow.storage.report_structs import Count, ReportTable, Share, StageReport
from mlxflow.training.figures import TrainingFigures, TrainingRun


class LayerFigures(ReportTable, frozen=True, kw_only=True):
    """A matrix of the model.

    Attributes:
        path: of its layer.
        shape: of the dense matrix.
        mode: of quantization; "dense" if not quantized.
        bits: of a code; 0 if dense.
        group_size: weights that share a scale; 0 if dense.
        bytes: stored size of its weight, scales and biases included.
        parameters: weights of the dense matrix.
        bits_per_weight: stored bits by parameters.
        relative_error: Frobenius norm of the rounding error divided by that of the matrix; 0 if dense.
    """

    path: str
    shape: tuple[Count, ...]
    mode: str
    bits: Count
    group_size: Count
    bytes: Count
    parameters: Count
    bits_per_weight: float
    relative_error: float


class QualityFigures(ReportTable, frozen=True, kw_only=True):
    """The quantized model against the dense one, on validation rows.

    Attributes:
        tokens: predicted.
        dense_perplexity: of the dense model.
        dense_perplexity_standard_error: of the same.
        perplexity: of the quantized model.
        perplexity_standard_error: of the same.
        perplexity_increase: relative to the dense model's.
        kl: mean divergence of the predicted distributions, in nats per token.
        kl_standard_error: of the same.
        top1_agreement: share of tokens whose likeliest prediction is the same.
        text: the rows that judge.
        overlap: share of their tokens that lie in passages of the calibration text, too.
    """

    tokens: Count
    dense_perplexity: float
    dense_perplexity_standard_error: float
    perplexity: float
    perplexity_standard_error: float
    perplexity_increase: float
    kl: float
    kl_standard_error: float
    top1_agreement: float
    text: str | None = None
    overlap: Share = 0.0


class BlockFigures(ReportTable, frozen=True, kw_only=True):
    """A block that was trained by itself.

    Attributes:
        path: of the block.
        error_before_training: squared error of its outputs by their square, in the first updates; dimensions far larger
            than others count less.
        error_after_training: the same in the last ones.
        error: the same on all calibration rows, with the stored weights.
    """

    path: str
    error_before_training: float
    error_after_training: float
    error: float


class TuningFigures(ReportTable, frozen=True, kw_only=True):
    """The training of all scales and biases after the blocks.

    Attributes:
        steps: updates.
        first_loss: divergence from the dense model in nats per token, in the first updates.
        last_loss: in the last ones.
    """

    steps: Count
    first_loss: float
    last_loss: float


class RotationFigures(ReportTable, frozen=True, kw_only=True):
    """Rotations that were tried.

    Attributes:
        is_kept: whether the model is rotated.
        parts: that the architecture allows: "R1" of the residual stream, "R2" of the values of each head.
        left_out: the other part, and why.
        seed: of the best one.
        logits_difference: of the rotated from the dense model in fp32, by the largest logit if that is over 1.
        divergence: of the rounded model from the dense one with the best rotation, in nats per token, on calibration
            rows.
        divergence_without: the same without a rotation.
        divergences: the same with each rotation that was tried.
    """

    is_kept: bool
    parts: tuple[str, ...]
    left_out: str
    seed: Count
    logits_difference: float
    divergence: float
    divergence_without: float
    divergences: tuple[float, ...]


class BudgetPlanFigures(ReportTable, frozen=True, kw_only=True):
    """A plan within a budget.

    Attributes:
        name: "mixed", "mixed 2" and further ones of corrected costs, or the setting that all layers share.
        bits_per_weight: stored bits of its layers by their parameters.
        divergence: of the quantized from the dense model in nats per token, on training rows.
        is_chosen: whether the model has it.
    """

    name: str
    bits_per_weight: float
    divergence: float
    is_chosen: bool


class BudgetFigures(ReportTable, frozen=True, kw_only=True):
    """The plans that were measured for a budget.

    Attributes:
        measured_with: the method whose codes were measured.
        plans: these plans.
    """

    measured_with: str
    plans: tuple[BudgetPlanFigures, ...]


class TeacherFigures(ReportTable, frozen=True, kw_only=True):
    """The cached distributions of the dense model that a method distilled.

    Attributes:
        file: name in the cache, which identifies the model's content and the text.
        tokens: positions of the text.
        likeliest: tokens listed for each.
        probability: of the listed tokens together, mean over the positions.
    """

    file: str
    tokens: Count
    likeliest: Count
    probability: Share


class QuantizeReport(StageReport, frozen=True, kw_only=True):
    """The figures of a quantize stage.

    Attributes:
        method: "rtn", "gptq", "awq", "dwq", "block" or "qat".
        mode: of layers without a rule, as are `bits` and `group_size`.
        bits: of a code.
        group_size: weights that share a scale.
        parameters: weights of the dense model, tied ones once.
        bits_per_weight: stored bits of all tensors by parameters.
        dense_bits_per_weight: the same of the dense model.
        model_bytes: of `model.safetensors`.
        compression_ratio_fp32: size of the weights in fp32 by `model_bytes`.
        compression_ratio_bf16: size of the weights in bf16 by `model_bytes`.
        quantized_layers: module paths.
        dense_layers: module paths of layers that stay dense.
        layers: every matrix, in the model's order.
        layers_toml: the plan that a budget chose, as TOML of the key `layers`; None without a budget.
        budget: the plans that were measured for a budget; None without one.
        kernels: names of the fused GPU kernels in use; None if nothing was trained.
        training: of quantization-aware training; None without it.
        blocks: of the method "block"; empty for others.
        tuning: of all scales after the blocks; None without.
        rotation: that was tried; None without.
        teacher: distributions of the dense model that were distilled; None without, or if they were not cached.
        start: the variant whose codes and grids training began with; None without.
        calibration_text: the rows that the method learned; None if it learned none.
        quality: None without tokens.
        warnings: about figures that flatter the method.
        run: the stage's own keys; None if nothing was trained.
    """

    method: str
    mode: str
    bits: Count
    group_size: Count
    parameters: Count
    bits_per_weight: float
    dense_bits_per_weight: float
    model_bytes: Count
    compression_ratio_fp32: float
    compression_ratio_bf16: float
    quantized_layers: tuple[str, ...]
    dense_layers: tuple[str, ...]
    layers: tuple[LayerFigures, ...]
    layers_toml: str | None = None
    budget: BudgetFigures | None = None
    kernels: tuple[str, ...] | None = None
    training: TrainingFigures | None = None
    blocks: tuple[BlockFigures, ...] = ()
    tuning: TuningFigures | None = None
    rotation: RotationFigures | None = None
    teacher: TeacherFigures | None = None
    start: str | None = None
    calibration_text: str | None = None
    quality: QualityFigures | None = None
    warnings: tuple[str, ...] = ()
    run: TrainingRun | None = None
