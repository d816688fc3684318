"""The work of a quantization, counted from shapes: floating-point operations, and bytes of arrays held together."""

from typing import NamedTuple

import mlx.core as mx

from mlxflow.quantization.block_method import TOKENS_PER_STEP
from mlxflow.quantization.budget_choice import CORRECTIONS, SLOPE_ROWS, UNIFORM
from mlxflow.quantization.done_work import DoneWork
from mlxflow.quantization.host_pace import HostWork
from mlxflow.quantization.model_shape import ModelShape
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.rounding_check import CHECKED_ROWS
from mlxflow.quantization.teacher_logits import positions_in_loss

# Forward passes over the calibration rows that a method is worth, besides what is counted in detail
_PASSES = {"rtn": 0, "gptq": 2, "awq": 60, "dwq": 6, "block": 6, "qat": 0}

# Operations to round a weight to a fitted grid, and to pack it; on a CPU MLX compares a weight with every float of 4
# bits. Below: those of a logit in a comparison of two models, and in a training loss: exponentials and passes over
# memory, in the time of so many operations in products
_ROUNDING, _PACKING, _PACKING_SMALL_FLOATS_ON_CPU = 1500, 100, 8_000
_COMPARING, _TRAINING_LOSS = 10_000, 5_000

_NOTHING = DoneWork()

# Bytes of logits for six arrays of them when a quality loss is measured, by device; see `evaluation.slices`
_LOGITS_BYTES = {"cpu": 128 << 20, "gpu": 512 << 20}

# Bytes for each weight of a block in its training: positions, two averages, gradients and rounded weights, in fp32, and
# what a layer of the block needs meanwhile
_BLOCK_TRAINING = 25

# The same of a model in its training; for the costs for a budget: weights, gradients, sums. Rows in a step of DWQ
_TRAINING, _GRADIENT_SUMS, _DWQ_ROWS = 28, 16, 4

# Bytes of the codes of a weight at a setting, and the most that a budget holds of a block; see `sensitivity`
_CODES, _MOST_CODES = 0.65, 5 << 29


class QuantizationWork(NamedTuple):
    """The work of a quantization.

    Attributes:
        operations: floating-point operations of the device.
        held_bytes: of arrays held together.
        host: work on the CPU, also when the device is a GPU.
    """

    operations: float
    held_bytes: float
    host: HostWork


def work_of(
    request: QuantizationRequest,
    shape: ModelShape,
    *,
    row_tokens: int,
    num_rows: int,
    validation_rows: int,
    is_unusual: bool = False,
    done: DoneWork = _NOTHING,
) -> QuantizationWork:
    """Return the work of a request.

    Args:
        request: method, settings and limits.
        shape: of the model.
        row_tokens: tokens of a row, L.
        num_rows: training rows.
        validation_rows: on which the result is measured.
        is_unusual: whether the blocks of the model cannot be computed one by one; see `held_models`.
        done: by an interrupted run; its operations are not counted.
    """
    tokens = min(request.calibration_rows, num_rows) * row_tokens
    one_pass = 2.0 * shape.parameters * tokens
    own = _method_operations(request, shape, one_pass, tokens, row_tokens, num_rows)
    left = _method_operations(request, shape, one_pass, tokens, row_tokens, num_rows, done)
    operations = left + shape.parameters * _packing(request) + 4.0 * shape.parameters * validation_rows * row_tokens
    operations += 6.0 * shape.parameters * _checked_rows(request, validation_rows) * row_tokens
    operations += _logit_operations(request, tokens, row_tokens, validation_rows, done) * shape.vocab_size
    operations += (request.rotations + 2) * one_pass if request.rotations else 0.0
    if request.budget is not None:
        pairs = len(request.budget.candidate_bits) * len(request.budget.candidate_group_sizes)
        trial = _method_operations(
            request._replace(block_steps=0, scale_steps=0, training=None), shape, one_pass, tokens, row_tokens, num_rows
        )
        trials = max(0.0, pairs - done.trials)
        operations += trials * trial + pairs * shape.parameters * _ROUNDING + 6.0 * one_pass
        operations += own + _first_plans(request) * one_pass
        plans, slope_tokens = _corrections(request, tokens, row_tokens)
        operations += plans * (one_pass + shape.parameters * _PACKING) + 12.0 * shape.parameters * slope_tokens
    held = max(
        _learning_bytes(request, shape, tokens, row_tokens),
        _measuring_bytes(shape, validation_rows * row_tokens),
        *held_models(request, shape, row_tokens=row_tokens, tokens=tokens, is_unusual=is_unusual).values(),
    )
    return QuantizationWork(operations, held, _host_work(request, shape, done))


def _packing(request: QuantizationRequest) -> int:
    """Return the operations to pack a weight in the mode of most layers."""
    is_slow = mx.default_device() == mx.cpu and request.default.mode in ("mxfp4", "nvfp4")
    return _PACKING_SMALL_FLOATS_ON_CPU if is_slow else _PACKING


def _host_work(request: QuantizationRequest, shape: ModelShape, done: DoneWork) -> HostWork:
    """Return the work on the CPU: of `error_compensation`, and of the three factorizations in mlx-lm's GPTQ."""
    times = 1 - done.learned
    if request.budget is not None:
        pairs = len(request.budget.candidate_bits) * len(request.budget.candidate_group_sizes)
        times += max(0.0, pairs - done.trials)
    if request.method == "gptq":
        return HostWork(times * 4 / 3 * shape.cubic_widths, 0.0, 0.0)
    if request.method == "block":
        work = shape.distinct_cubes / 3, shape.compensations, float(shape.parameters)
        return HostWork(*(times * one for one in work))
    return HostWork(0.0, 0.0, 0.0)


def held_models(
    request: QuantizationRequest, shape: ModelShape, *, row_tokens: int, tokens: int, is_unusual: bool
) -> dict[str, float]:
    """Return the parts of a request that hold all layers of a model at once, and about the bytes that each takes.

    Args:
        request: method, settings and limits.
        shape: of the model.
        row_tokens: tokens of a row, L.
        tokens: of the calibration rows.
        is_unusual: whether the blocks cannot be computed one by one: then "gptq" and the costs for a budget do so.

    Returns:
        bytes by part: "gptq", "budget", "dwq", "scale_steps", "scales" or "qat".
    """
    found: dict[str, float] = {}
    if is_unusual and request.method == "gptq":  # weights, Hessians and codes
        found["gptq"] = shape.num_bytes + 4.0 * shape.square_widths + shape.parameters + 16.0 * shape.largest
    if is_unusual and request.budget is not None:
        activations = shape.num_blocks * _activation_bytes(shape, row_tokens, row_tokens)
        found["budget"] = _GRADIENT_SUMS * shape.parameters + activations + 16.0 * row_tokens * shape.vocab_size
    if request.method == "dwq":
        found["dwq"] = _recomputed_tuning_bytes(shape, _DWQ_ROWS * row_tokens, row_tokens)
    if request.method == "block" and request.scale_steps:
        positions, some = min(TOKENS_PER_STEP, tokens), positions_in_loss(shape.vocab_size)
        found["scale_steps"] = _recomputed_tuning_bytes(shape, positions, row_tokens, logits_of=some, on_cpu=28.0)
    if request.training is not None:
        positions = request.training.settings.batch_size * row_tokens
        if request.training.trains == "scales":
            found["scales"] = _tuning_bytes(shape, positions, row_tokens, distills=request.training.distills)
        else:
            activations = 64.0 * positions * shape.hidden_size * shape.num_blocks
            logits = _loss_bytes(shape, positions, distills=request.training.distills)
            found["qat"] = _TRAINING * shape.parameters + logits + activations
    return found


def _method_operations(
    request: QuantizationRequest,
    shape: ModelShape,
    one_pass: float,
    tokens: int,
    row_tokens: int,
    num_rows: int,
    done: DoneWork = _NOTHING,
) -> float:
    operations = _PASSES[request.method] * one_pass
    if request.method in ("gptq", "block"):
        operations += 2.0 * tokens * shape.square_widths
    if request.method == "gptq":
        operations += shape.compensations
    if request.method == "block":
        operations += shape.parameters * _ROUNDING + 6.0 * request.block_steps * TOKENS_PER_STEP * shape.blocks
    operations *= 1 - done.learned
    if request.method == "block" and request.scale_steps:
        steps = request.scale_steps - done.scale_steps
        operations += 8.0 * steps * TOKENS_PER_STEP * shape.parameters + (0.0 if done.scale_steps else one_pass)
    if request.training is not None:
        settings = request.training.settings
        read = (settings.num_steps - done.training_steps) * settings.rows_per_step
        operations += shape.parameters * _ROUNDING + 6.0 * shape.parameters * read * row_tokens
        if request.training.distills:
            operations += 2.0 * shape.parameters * min(read, num_rows) * row_tokens
    return operations


def _logit_operations(
    request: QuantizationRequest, tokens: int, row_tokens: int, validation_rows: int, done: DoneWork
) -> float:
    """Return the operations on the logits of all positions, for each entry of the vocabulary."""
    compared, trained = (validation_rows + 2 * _checked_rows(request, validation_rows)) * row_tokens, 0.0
    if request.rotations:
        compared += (request.rotations + 1) * tokens
    if request.budget is not None:
        plans, slope_tokens = _corrections(request, tokens, row_tokens)
        compared, trained = compared + (_first_plans(request) + plans) * tokens, trained + tokens + slope_tokens
    if request.method == "dwq":
        trained += 2 * tokens * (1 - done.learned)
    if request.method == "block" and request.scale_steps:
        trained += (request.scale_steps - done.scale_steps) * min(TOKENS_PER_STEP, tokens)
        trained += 0 if done.scale_steps else tokens
    if request.training is not None:
        settings = request.training.settings
        steps = settings.num_steps - done.training_steps
        trained += steps * settings.rows_per_step * row_tokens * (2 if request.training.distills else 1)
    return float(_COMPARING * compared + _TRAINING_LOSS * trained)


def _first_plans(request: QuantizationRequest) -> int:
    """Return the plans that a budget measures before costs are corrected: a mixed one, and the most uniform ones."""
    return 1 + UNIFORM.get(request.method, 1)


def _corrections(request: QuantizationRequest, tokens: int, row_tokens: int) -> tuple[int, int]:
    """Return the plans of corrected costs for a budget, and the tokens of all slopes: at two plans before the first."""
    plans = CORRECTIONS.get(request.method, 0)
    return plans, (plans + 1 if plans else 0) * min(tokens, SLOPE_ROWS * row_tokens)


def _checked_rows(request: QuantizationRequest, validation_rows: int) -> int:
    """Return the rows on which a learned model is compared with rounding: three models run on them."""
    return 0 if request.method == "rtn" else min(CHECKED_ROWS, validation_rows)


def _learning_bytes(request: QuantizationRequest, shape: ModelShape, tokens: int, row_tokens: int) -> float:
    """Return about the bytes of arrays that a method holds together at most, where it needs one block at a time."""
    item = shape.num_bytes / max(1, shape.parameters)
    block, hidden = shape.blocks / shape.num_blocks, _width_in_products(shape) * tokens * shape.hidden_size
    outside = shape.num_bytes * (1 - shape.blocks / max(1, shape.parameters))
    step = _activation_bytes(shape, min(TOKENS_PER_STEP, tokens), row_tokens)
    of_method = {
        "rtn": 8.0 * shape.largest,
        "gptq": outside + 2 * hidden + item * block + _hessian_bytes(shape),
        # the search for groups, in fp32; and the inputs and outputs of all layers on a slice
        "awq": outside + hidden + max((2 * item + 9) * block + step / 4, 1.6 * item * block + 0.8 * step),
        "block": max(_BLOCK_TRAINING * block + step, 26.0 * min(shape.largest, 1 << 24) + 2 * outside),
    }.get(request.method, 0.0)
    if request.rotations:
        of_method = max(of_method, _rotating_bytes(shape), _comparing_bytes(shape, tokens))
    if request.budget is not None:
        of_method = max(of_method, _cost_bytes(request, shape, row_tokens), _comparing_bytes(shape, tokens))
    return of_method


def _outside(shape: ModelShape) -> tuple[int, int]:
    """Return the weights outside of the blocks: of all their layers, and of the largest one."""
    numbers = shape.parameters - shape.blocks
    return numbers, min(numbers, shape.largest)


def _width_in_products(shape: ModelShape) -> float:
    """Return the bytes of a weight in products: a CPU computes in fp32."""
    return 4.0 if mx.default_device() == mx.cpu else shape.num_bytes / max(1, shape.parameters)


def _comparing_bytes(shape: ModelShape, positions: int) -> float:
    """Return about the bytes of a comparison with stored codes: the dense head, rounded outer layers, and logits."""
    numbers, largest = _outside(shape)
    item, logits = shape.num_bytes / max(1, shape.parameters), _LOGITS_BYTES[_device()]
    least = _measuring_bytes(shape, positions)
    held = _width_in_products(shape) * (numbers + largest) + item * largest
    return max(least, held + min(logits, 24.0 * shape.vocab_size * positions))


def _rotating_bytes(shape: ModelShape) -> float:
    """Return about the bytes of rotating a block, or the layers outside: in fp32 for the check, and to be rounded."""
    numbers, largest = _outside(shape)
    item = shape.num_bytes / max(1, shape.parameters)
    checked = 4.0 * (numbers - largest) + (8 + item) * largest
    stored = (_width_in_products(shape) + 5.5 * item) * largest
    return max(checked, stored, 9.0 * shape.blocks / shape.num_blocks)


def _cost_bytes(request: QuantizationRequest, shape: ModelShape, row_tokens: int) -> float:
    """Return about the bytes of the gradients for a budget's costs: of a block, or of the largest layer outside.

    Rounding sums their squares in fp32; other methods take their products with the errors of codes. Slopes at a
    quantized model need the dense weights as well.
    """
    block, (_, largest) = shape.blocks / shape.num_blocks, _outside(shape)
    width, activations = _width_in_products(shape), _activation_bytes(shape, row_tokens, row_tokens)
    sums, codes = 4.0, 0.0
    if request.method != "rtn" and request.budget is not None:
        pairs = len(request.budget.candidate_bits) * len(request.budget.candidate_group_sizes)
        sums, codes = width if CORRECTIONS.get(request.method) else 0.0, pairs * _CODES
    held = [one if one <= _MOST_CODES else _CODES * size for size in (block, largest) for one in (codes * size,)]
    return max((2 * width + sums) * block + activations + held[0], (3 * width + sums) * largest + held[1])


def _activation_bytes(shape: ModelShape, positions: int, row_tokens: int) -> float:
    """Return about the bytes of a block's activations in a backward pass, attention scores included."""
    return 4.0 * positions * (8 * shape.widest + 20 * shape.hidden_size + 3 * shape.heads * row_tokens)


def _loss_bytes(shape: ModelShape, positions: int, *, distills: bool) -> float:
    """Return about the bytes of a training loss: logits of all positions, or of a part, and the head's gradient."""
    whole = 16.0 * positions * shape.vocab_size
    part = 16.0 * positions_in_loss(shape.vocab_size) * shape.vocab_size + 12.0 * _outside(shape)[1]
    return min(whole, part) if distills else whole


def _tuning_bytes(shape: ModelShape, positions: int, row_tokens: int, *, distills: bool) -> float:
    """Return about the bytes of a quantized model whose scales are trained: on a CPU with dequantized weights."""
    weights = shape.parameters * (9.0 if mx.default_device() == mx.cpu else 1.0)
    activations = shape.num_blocks * _activation_bytes(shape, positions, row_tokens)
    return weights + activations + _loss_bytes(shape, positions, distills=distills)


def _recomputed_tuning_bytes(
    shape: ModelShape, positions: int, row_tokens: int, *, logits_of: int | None = None, on_cpu: float = 14.0
) -> float:
    """Return about the same where the blocks are recomputed: their inputs, and one block or the head at a time.

    Args:
        shape: of the model.
        positions: of a step.
        row_tokens: of a row.
        logits_of: positions whose logits are held at a time; None for all of a step.
        on_cpu: bytes of a weight that a CPU dequantizes, in fp32, with its gradient; adjusted to what runs took.
    """
    block, (_, largest) = shape.blocks / shape.num_blocks, _outside(shape)
    weight = on_cpu if mx.default_device() == mx.cpu else 6.0
    inputs = shape.num_blocks * positions * shape.hidden_size * _width_in_products(shape)
    held = positions if logits_of is None else min(positions, logits_of)
    head = weight * largest + 16.0 * held * shape.vocab_size
    return 1.2 * shape.parameters + inputs + max(head, weight * block + _activation_bytes(shape, positions, row_tokens))


def _hessian_bytes(shape: ModelShape) -> float:
    """Return about the bytes of a block's Hessians, of the inverse of the widest, and of a layer that is learned."""
    return 4.0 * shape.square_widths / shape.num_blocks + 12.0 * shape.widest * (shape.widest + shape.hidden_size)


def _device() -> str:
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def _measuring_bytes(shape: ModelShape, positions: int) -> float:
    """Return about the bytes that the measurement of the quality loss holds: two heads, and logits or a block."""
    outside = _width_in_products(shape) * _outside(shape)[0]
    room = _LOGITS_BYTES[_device()]
    arrays = 4 if _width_in_products(shape) > 3 else 6  # logits of 16 bits are held in fp32 as well
    logits = min(room * arrays / 6, 4.0 * arrays * shape.vocab_size * positions)
    return 2 * outside + max(logits, 5 * shape.blocks / shape.num_blocks)
