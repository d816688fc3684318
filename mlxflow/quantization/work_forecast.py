"""What a quantization will take, said before it starts: seconds and memory, from a short trial or from earlier runs.

The work of a method is counted in floating-point operations, and a trial of this device's products gives seconds. What
is computed on the CPU, also when the device is a GPU, is counted and tried by itself; see `host_pace`. How
far a method is from that differs by device and model, so each finished run records by how much it missed, and later
runs of the same method are predicted with it; the first one has a wide interval.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.device import compute_device, phase_peaks
from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.models.fp32_on_cpu import dtype_in_products
from mlxflow.quantization.block_calls import find_blocks, kind_of_model
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.done_work import done_work
from mlxflow.quantization.host_pace import HostWork, host_pace
from mlxflow.quantization.memory_advice import memory_advice
from mlxflow.quantization.model_shape import ModelShape
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.work_counts import held_models, work_of
from mlxflow.quantization.work_records import WorkRecord, read_records, write_records
from mlxflow.storage.run_context import Context
from mlxflow.training.progress import duration

#: Records of earlier runs, in the state folder.
FILE = "quantize-rates.json"

# Records of a method that are kept
_MOST_RECORDS = 8

# Products of the trial: rows by device, the widest, and the seconds that they take at least: on a busy machine a single
# product may wait longer than it computes
_TRIAL_ROWS, _MOST_WIDTH, _TRIAL_SECONDS = {"cpu": 128, "gpu": 4096}, 1024, 0.05

# Seconds that any run takes besides its products: else a small model's would say nothing of a large one's
_FIXED_SECONDS = 1.0

# Without a record: how many times slower the work is than products alone, by method, and the factor of the interval
_SLOWER, _UNKNOWN = {"rtn": 2.0, "awq": 1.5}, 3.0
_USUALLY_SLOWER = 2.5

# With records: the smallest factor of the interval, and that of a single record
_LEAST_FACTOR, _ONE_RECORD = 1.2, 1.6


class PredictedRange(NamedTuple):
    """A prediction: the likeliest value, and an interval around it."""

    value: float
    low: float
    high: float


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
    begin, seconds, count = time.perf_counter(), 0.0, 0
    while seconds < _TRIAL_SECONDS:
        mx.eval(x @ weight.T)
        count += 1
        seconds = time.perf_counter() - begin
    return 2.0 * count * rows * 4 * width * width / seconds


def _host_seconds(work: HostWork) -> float:
    return work.seconds(host_pace()) if any(work) else 0.0


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
    unusual = _unusual_blocks(request, dense.model, length)
    done = done_work(request, context.unfinished, num_blocks=shape.num_blocks)
    counted_work = partial(
        work_of,
        shape=shape,
        row_tokens=length,
        num_rows=num_rows,
        validation_rows=validation_rows,
        is_unusual=bool(unusual),
        done=done,
    )
    work = counted_work(request)
    speed = operations_per_second(shape.hidden_size, dtype_of_products(dense.model))
    counted = _FIXED_SECONDS + work.operations / speed + _host_seconds(work.host)
    kind = f"{kind_of(request)} of a whole model" if unusual else kind_of(request)
    file, name = context.state / FILE, f"{kind} on {context.device} {compute_device.name()}"
    records = read_records(file)
    own = records.get(name, [])
    terminal.say(described(kind, counted, work.held_bytes, own, task=context.task, done=done.description))
    read = min(request.calibration_rows, num_rows) * length
    held = held_models(request, shape, row_tokens=length, tokens=read, is_unusual=bool(unusual))
    lines = [*_held_lines(held, unusual, task=context.task)]
    if work.held_bytes > context.memory_limit_bytes > 0:
        has_blocks = not isinstance(find_blocks(dense.model, context_length=length), str)
        lines.append(
            memory_advice(
                request,
                lambda other: counted_work(other).held_bytes,
                limit_bytes=context.memory_limit_bytes,
                learns_blocks=has_blocks and tokens is not None,
                task=context.task,
            )
        )
    for line in lines:
        terminal.say(line)
    is_resumed = context.unfinished.is_dir() and any(context.unfinished.iterdir())
    begin = time.perf_counter()
    with phase_peaks.followed() as peak:
        yield
    if not is_resumed:
        record = WorkRecord((time.perf_counter() - begin) / counted, peak.bytes / work.held_bytes)
        write_records(file, records | {name: [*own, record][-_MOST_RECORDS:]})


def dtype_of_products(model: nn.Module) -> mx.Dtype:
    """Return the dtype of most products of a quantization; see `models.fp32_on_cpu`."""
    stored = next((layer.weight.dtype for layer in quantizable_layers(model).values()), mx.float32)
    return dtype_in_products(stored)


def _unusual_blocks(request: QuantizationRequest, model: nn.Module, context_length: int) -> str:
    """Return why a part of a request cannot compute blocks one by one, in words; empty if it can, or needs not to."""
    needs_blocks = request.method == "gptq" or request.budget is not None
    found = find_blocks(model, context_length=context_length) if needs_blocks else None
    if not isinstance(found, str):
        return ""
    return f"since {kind_of_model(model)} cannot be computed block by block: it has {found}"


# What a part of a request holds of a whole model, see `held_models`; and why, where the blocks are not the reason
_HELD = {
    "gptq": "gptq holds the whole dense model and the Hessians of all its layers",
    "budget": "the costs for a budget hold the whole dense model and gradients of all its weights",
    "dwq": "dwq holds the whole quantized model with gradients and averages of its scales",
    "scale_steps": "scale_steps hold the whole quantized model with gradients and averages of its scales",
    "scales": 'training = "scales" holds the whole quantized model with gradients and averages of its scales',
    "qat": "qat holds the whole dense model with gradients and averages of what it trains",
}
_TRAINS = "since it trains all layers at once"


def _held_lines(held: Mapping[str, float], unusual: str, *, task: str) -> Iterator[str]:
    """Yield a line for each part of a request that holds a whole model.

    Args:
        held: bytes by part.
        unusual: why blocks cannot be computed one by one, in words.
        task: the stage.
    """
    for part, size in held.items():
        why = unusual if part in ("gptq", "budget") else _TRAINS
        yield f"{task}: {_HELD[part]}, {why}; that takes about {show_bytes(size)}"


def kind_of(request: QuantizationRequest) -> str:
    """Return the method and what else is done besides it, in words: runs of one kind predict each other.

    Float modes are kinds of their own: on a CPU they are packed at another pace and in other memory than affine codes.
    """
    extras = {
        "rotations": request.rotations,
        "scales": request.scale_steps,
        "a budget": request.budget is not None,
        "distillation": request.training is not None and request.training.distills,
    }
    found = [name for name, is_done in extras.items() if is_done]
    mode = request.default.stored_mode
    method = request.method if mode == "affine" else f"{request.method} in {mode}"
    return f"{method} with {' and '.join(found)}" if found else method


def described(
    method: str, seconds: float, held_bytes: float, records: Sequence[WorkRecord], *, task: str, done: str = ""
) -> str:
    """Return the line that says what a method will take.

    Args:
        method: see `kind_of`.
        seconds: counted.
        held_bytes: counted.
        records: of earlier runs of the method on this device.
        task: the stage.
        done: what an interrupted run has done, in words; empty for nothing.
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
    line = f"{task}: {method} will take {long} and {much}, {source}"
    return f"{line}; {done}, which is not counted" if done else line
