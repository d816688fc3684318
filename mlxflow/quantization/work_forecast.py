"""What a quantization will take, said before it starts: seconds and memory, from a short trial or from earlier runs.

The work of a method is counted in floating-point operations, and a trial of this device's products gives seconds. How
far a method is from that differs by device and model, so each finished run records by how much it missed, and later
runs of the same method are predicted with it; the first one has a wide interval.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.device import compute_device, phase_peaks
from mlxflow.messages import terminal
from mlxflow.quantization.block_method import TOKENS_PER_STEP
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.work_records import WorkRecord, read_records, write_records
from mlxflow.storage.run_context import Context
from mlxflow.training.progress import duration

_FILE = "quantize-rates.json"

# Records of a method that are kept
_MOST_RECORDS = 8

# Products of the trial: rows by device, their number, and the widest
_TRIAL_ROWS, _TRIAL_PRODUCTS, _MOST_WIDTH = {"cpu": 128, "gpu": 4096}, 2, 1024

# Seconds that any run takes besides its products: else a small model's would say nothing of a large one's
_FIXED_SECONDS = 1.0

# Without a record: how many times slower the work is than products alone, by method, and the factor of the interval
_SLOWER, _UNKNOWN = {"rtn": 1.0, "block": 4.0}, 3.0
_USUALLY_SLOWER = 2.5

# With records: the smallest factor of the interval, and that of a single record
_LEAST_FACTOR, _ONE_RECORD = 1.2, 1.6

# Forward passes over the calibration rows that a method is worth, besides what is counted in detail
_PASSES = {"rtn": 0, "gptq": 2, "awq": 60, "dwq": 5, "block": 6, "qat": 0}

# Operations to round a weight to a fitted grid, and to pack it
_ROUNDING, _PACKING = 1500, 100

# Bytes of the logits that are held at a time when a quality loss is measured, by device
_MEASURED_BYTES = {"cpu": 130_000_000, "gpu": 520_000_000}

# Bytes for each weight of a block in its training: positions, averages and gradients, and the weights themselves
_BLOCK_TRAINING = 36


class ModelShape(NamedTuple):
    """The sizes of a model on which its quantization depends.

    Attributes:
        parameters: weights of the layers that can be quantized.
        blocks: the same within the blocks.
        num_blocks: of them.
        num_bytes: of all parameters.
        square_widths: sum over the layers of the squares of their widths.
        cubic_widths: of their cubes.
        hidden_size: D.
        largest: weights of the largest layer.
        vocab_size: V.
    """

    parameters: int
    blocks: int
    num_blocks: int
    num_bytes: int
    square_widths: float
    cubic_widths: float
    hidden_size: int
    largest: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int) -> "ModelShape":
        """Return the sizes of a dense model; its weights may be lazy."""
        shapes = {path: layer.weight.shape for path, layer in quantizable_layers(model).items()}
        sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        widths = [float(shape[-1]) for shape in shapes.values()]
        inside = [path for path in sizes if ".layers." in path or path.startswith("layers.")]
        return cls(
            parameters=sum(sizes.values()),
            blocks=sum(sizes[path] for path in inside),
            num_blocks=max(1, len(getattr(model, "layers", None) or [])),
            num_bytes=sum(value.nbytes for _, value in tree_flatten(model.parameters())),
            square_widths=sum(width**2 for width in widths),
            cubic_widths=sum(width**3 for width in widths),
            hidden_size=int(min(widths, default=1)),
            largest=max(sizes.values(), default=0),
            vocab_size=vocab_size,
        )


class QuantizationWork(NamedTuple):
    """The work of a quantization: floating-point operations, and bytes of arrays held together."""

    operations: float
    held_bytes: float


class PredictedRange(NamedTuple):
    """A prediction: the likeliest value, and an interval around it."""

    value: float
    low: float
    high: float


def work_of(
    request: QuantizationRequest, shape: ModelShape, *, row_tokens: int, num_rows: int, validation_rows: int
) -> QuantizationWork:
    """Return the work of a request.

    Args:
        request: method, settings and limits.
        shape: of the model.
        row_tokens: tokens of a row, L.
        num_rows: training rows.
        validation_rows: on which the result is measured.
    """
    tokens = min(request.calibration_rows, num_rows) * row_tokens
    one_pass = 2.0 * shape.parameters * tokens
    own = _method_operations(request, shape, one_pass, tokens, row_tokens, num_rows)
    operations = own + shape.parameters * _PACKING + 4.0 * shape.parameters * validation_rows * row_tokens
    operations += (request.rotations + 2) * one_pass if request.rotations else 0.0
    if request.budget is not None:
        pairs = len(request.budget.candidate_bits) * len(request.budget.candidate_group_sizes)
        trial = _method_operations(
            request._replace(block_steps=0, scale_steps=0, training=None), shape, one_pass, tokens, row_tokens, num_rows
        )
        operations += pairs * (trial + shape.parameters * _ROUNDING) + 6.0 * one_pass + (own + one_pass)
    return QuantizationWork(operations, _held_bytes(request, shape, tokens, row_tokens))


def _method_operations(
    request: QuantizationRequest, shape: ModelShape, one_pass: float, tokens: int, row_tokens: int, num_rows: int
) -> float:
    operations = _PASSES[request.method] * one_pass
    if request.method in ("gptq", "block"):
        operations += 2.0 * tokens * shape.square_widths + 4.0 * shape.cubic_widths
    if request.method == "block":
        operations += shape.parameters * _ROUNDING + 6.0 * request.block_steps * TOKENS_PER_STEP * shape.blocks
        if request.scale_steps:
            operations += 6.0 * request.scale_steps * TOKENS_PER_STEP * shape.parameters + one_pass
    if request.training is not None:
        settings = request.training.settings
        read = settings.num_steps * settings.rows_per_step
        operations += shape.parameters * _ROUNDING + 6.0 * shape.parameters * read * row_tokens
        if request.training.distills:
            operations += 2.0 * shape.parameters * min(read, num_rows) * row_tokens
    return operations


def _held_bytes(request: QuantizationRequest, shape: ModelShape, tokens: int, row_tokens: int) -> float:
    """Return about the bytes of arrays that are held together at most."""
    block, hidden = shape.blocks / shape.num_blocks, 4.0 * tokens * shape.hidden_size
    outside = shape.num_bytes * (1 - shape.blocks / max(1, shape.parameters))
    step_logits = 16.0 * TOKENS_PER_STEP * shape.vocab_size
    of_method = {
        "rtn": 8.0 * shape.largest,
        "gptq": outside + 2 * hidden + 12 * block,
        "awq": outside + 8 * hidden + 16 * block,
        "dwq": 2.0 * shape.num_bytes + 16.0 * 4 * row_tokens * shape.vocab_size,
        "block": max(_BLOCK_TRAINING * block, 26.0 * min(shape.largest, 1 << 24) + 2 * outside),
        "qat": 0.0,
    }[request.method]
    if request.budget is not None:  # gradients of the whole model, and what is made of them
        of_method = max(of_method, 12.0 * shape.parameters + 16.0 * row_tokens * shape.vocab_size)
    if request.method == "block" and request.scale_steps:
        of_method = max(of_method, 1.5 * shape.num_bytes + step_logits)
    if request.training is not None:
        settings = request.training.settings
        positions = settings.batch_size * row_tokens
        activations = 64.0 * positions * shape.hidden_size * shape.num_blocks
        of_method = 32.0 * shape.parameters + 16.0 * positions * shape.vocab_size + activations
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    return max(of_method, 2 * outside + 8 * block + _MEASURED_BYTES[device])


def predicted(exact: float, factors: Sequence[float], *, slower: float) -> PredictedRange:
    """Return a prediction with its interval.

    Args:
        exact: counted, in any unit.
        factors: of earlier runs: what was measured by what was counted.
        slower: the factor without an earlier run.
    """
    if not factors:
        value = exact * slower
        return PredictedRange(value, value / _UNKNOWN, value * _UNKNOWN)
    logs = np.log(np.asarray(factors, np.float64))
    value = exact * float(np.exp(np.median(logs)))
    spread = float(np.exp(2 * logs.std())) if len(factors) > 1 else _ONE_RECORD
    factor = max(_LEAST_FACTOR, spread)
    return PredictedRange(value, value / factor, value * factor)


def operations_per_second(width: int, dtype: mx.Dtype) -> float:
    """Return the operations a second of this device in products of a model's width, from a trial of a moment."""
    width = min(width, _MOST_WIDTH)
    rows = _TRIAL_ROWS["cpu" if mx.default_device() == mx.cpu else "gpu"]
    x, weight = mx.ones((rows, width), dtype), mx.ones((4 * width, width), dtype)
    mx.eval(x @ weight.T)
    begin = time.perf_counter()
    for _ in range(_TRIAL_PRODUCTS):
        mx.eval(x @ weight.T)
    seconds = max(time.perf_counter() - begin, 1e-6)
    return 2.0 * _TRIAL_PRODUCTS * rows * 4 * width * width / seconds


@contextmanager
def announced(
    request: QuantizationRequest, dense: DenseModel, tokens: TokenPair | None, context: Context
) -> Iterator[None]:
    """Say what a quantization will take, and record what it took when the block ends without an error.

    Args:
        request: method, settings and limits.
        dense: the model; its weights are not read.
        tokens: None for rounding without a measurement.
        context: of the stage.
    """
    length, num_rows, validation_rows = 1, 0, 0
    vocab_size = int(dense.config_json.get("vocab_size") or 0)
    if tokens is not None:
        length, num_rows = tokens.train.context_length, tokens.train.rows.num_rows
        validation_rows = min(request.limits.max_rows, tokens.validation.rows.num_rows)
        vocab_size = tokens.train.vocab_size
    shape = ModelShape.of(dense.model, vocab_size)
    work = work_of(request, shape, row_tokens=length, num_rows=num_rows, validation_rows=validation_rows)
    dtype = next((layer.weight.dtype for layer in quantizable_layers(dense.model).values()), mx.float32)
    if request.method == "block" and mx.default_device() == mx.cpu:
        dtype = mx.float32  # in which blocks are computed there
    counted = _FIXED_SECONDS + work.operations / operations_per_second(shape.hidden_size, dtype)
    kind = kind_of(request)
    file, name = context.state / _FILE, f"{kind} on {context.device} {compute_device.name()}"
    records = read_records(file)
    own = records.get(name, [])
    terminal.say(described(kind, counted, work.held_bytes, own, task=context.task))
    is_resumed = context.unfinished.is_dir() and any(context.unfinished.iterdir())
    begin = time.perf_counter()
    with phase_peaks.followed() as peak:
        yield
    if not is_resumed:
        record = WorkRecord((time.perf_counter() - begin) / counted, peak.bytes / work.held_bytes)
        write_records(file, records | {name: [*own, record][-_MOST_RECORDS:]})


def kind_of(request: QuantizationRequest) -> str:
    """Return the method and what else is done besides it, in words: runs of one kind predict each other."""
    extras = {
        "rotations": request.rotations,
        "scales": request.scale_steps,
        "a budget": request.budget is not None,
        "distillation": request.training is not None and request.training.distills,
    }
    found = [name for name, is_done in extras.items() if is_done]
    return f"{request.method} with {' and '.join(found)}" if found else request.method


def described(method: str, seconds: float, held_bytes: float, records: Sequence[WorkRecord], *, task: str) -> str:
    """Return the line that says what a method will take.

    Args:
        method: see `kind_of`.
        seconds: counted.
        held_bytes: counted.
        records: of earlier runs of the method on this device.
        task: the stage.
    """
    time_taken = predicted(seconds, [one.seconds for one in records], slower=_SLOWER.get(method, _USUALLY_SLOWER))
    memory = predicted(held_bytes, [one.held_bytes for one in records], slower=1.0)
    count = len(records)
    source = f"from {count} earlier run{'s' if count > 1 else ''} here" if count else "a guess: it never ran here"
    long, much = "less than 1 s", "less than 0.01 GB"
    if time_taken.high >= 1:
        long = f"about {duration(time_taken.value)} ({duration(time_taken.low)} to {duration(time_taken.high)})"
    if memory.high >= 1e7:
        much = f"{memory.value / 1e9:.2g} GB ({memory.low / 1e9:.2g} to {memory.high / 1e9:.2g})"
    return f"{task}: {method} will take {long} and {much}, {source}"
