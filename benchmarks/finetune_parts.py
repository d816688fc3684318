"""The parts of a fine-tuning step of an 8B model in 4 bits, each compiled and timed alone."""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.finetune_folder import random_codes
from benchmarks.shapes import LLAMA_8B, TINY_LLAMA

_SHAPE = TINY_LLAMA if os.environ.get("TINY") else LLAMA_8B
_ROUNDS = 2 if os.environ.get("TINY") else 5
_RANK = 8

Function = Callable[..., Any]


def main(rows: list[int]) -> None:
    """Print a line of JSON for each part: milliseconds of each way, and TFLOP/s of products.

    Args:
        rows: tokens of a pass, each; empty for 8,192.
    """
    import mlx.core as mx

    mx.random.seed(0)
    tokens = rows or [64 if os.environ.get("TINY") else 8192]
    hidden, inner = _SHAPE["hidden_size"], _SHAPE["intermediate_size"]
    head = hidden // _SHAPE["num_attention_heads"]
    shapes = {
        "q, o": (hidden, hidden),
        "k, v": (head * _SHAPE["num_key_value_heads"], hidden),
        "gate, up": (inner, hidden),
        "down": (hidden, inner),
    }
    for count in tokens:
        for name, (outputs, inputs) in shapes.items():
            _products(mx, name, count, outputs, inputs)
        _adapter(mx, count, inner, hidden)
        _elementwise(mx, count, hidden, inner)
        _attention(mx, count, head)
    _head(mx, tokens[0], hidden)


def _array(mx: Any, *shape: int, dtype: Any = None) -> Any:
    value = (mx.random.normal(shape) * 0.02).astype(dtype or mx.bfloat16)
    mx.eval(value)
    return value


def _quantized(mx: Any, outputs: int, inputs: int) -> Any:
    codes = random_codes(mx, (outputs, inputs * 4 // 32))
    scales = mx.full((outputs, inputs // 64), 0.004, mx.bfloat16)
    weight = codes, scales, scales * -7.5
    mx.eval(weight)
    return weight


def _milliseconds(mx: Any, function: Function, *inputs: Any) -> float | str:
    """Return the milliseconds of a call, the median of some rounds of several; the reason where it fails."""
    compiled = mx.compile(function)
    try:
        mx.eval(compiled(*inputs), compiled(*inputs))
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(compiled(*inputs))
        mx.synchronize()
        calls = max(1, min(20, int(0.03 / (time.perf_counter() - begin))))
        times = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            for _ in range(calls):
                mx.async_eval(compiled(*inputs))
            mx.synchronize()
            times.append((time.perf_counter() - begin) / calls)
    except (RuntimeError, ValueError) as error:
        return str(error)[:80]
    return round(statistics.median(times) * 1e3, 3)


def _print(part: str, rows: int, **times: Any) -> None:
    print(json.dumps({"part": part, "rows": rows} | times), flush=True)


def _products(mx: Any, name: str, rows: int, outputs: int, inputs: int) -> None:
    """Time a frozen quantized layer's product and its input's gradient, by MLX's kernel and through a dense copy."""
    codes, scales, biases = _quantized(mx, outputs, inputs)
    x, incoming = _array(mx, rows, inputs), _array(mx, rows, outputs)
    options = {"group_size": 64, "bits": 4}
    dense = mx.dequantize(codes, scales, biases, **options)
    mx.eval(dense)

    def time_of(function: Function, *inputs: Any) -> float | str:
        return _milliseconds(mx, function, *inputs)

    forward = time_of(lambda x, w: x @ w.T, x, dense)
    _print(
        f"{name}: {outputs} x {inputs}",
        rows,
        dense=forward,
        dense_tflops=round(2 * rows * outputs * inputs / forward / 1e9) if isinstance(forward, float) else None,
        dense_gradient=time_of(lambda x, w: x @ w, incoming, dense),
        dequantize=time_of(lambda *weight: mx.dequantize(*weight, **options), codes, scales, biases),
        quantized=time_of(lambda x, *weight: mx.quantized_matmul(x, *weight, **options), x, codes, scales, biases),
        quantized_gradient=time_of(
            lambda x, *weight: mx.quantized_matmul(x, *weight, transpose=False, **options),
            incoming,
            codes,
            scales,
            biases,
        ),
        dequantized=time_of(
            lambda x, *weight: x @ mx.dequantize(*weight, **options).T, x, codes, scales, biases
        ),
        dequantized_gradient=time_of(
            lambda x, *weight: x @ mx.dequantize(*weight, **options), incoming, codes, scales, biases
        ),
    )  # fmt: skip


def _adapter(mx: Any, rows: int, outputs: int, inputs: int) -> None:
    """Time LoRA's products beside one layer: mlx-lm's form, and with the sum within the second product."""
    x, y, a, b = (_array(mx, *shape) for shape in ((rows, inputs), (rows, outputs), (inputs, _RANK), (_RANK, outputs)))
    _print(
        f"LoRA {outputs} x {inputs}",
        rows,
        first_product=_milliseconds(mx, lambda x, a: x @ a, x, a),
        first_product_3_layers=_milliseconds(mx, lambda x, a: x @ a, x, mx.concatenate([a] * 3, axis=1)),
        second_product=_milliseconds(mx, lambda x, a, b: (x @ a) @ b, x, a, b),
        added_after=_milliseconds(mx, lambda x, y, a, b: y + (20.0 * ((x @ a) @ b)).astype(y.dtype), x, y, a, b),
        added_within=_milliseconds(mx, lambda x, y, a, b: mx.addmm(y, (x @ a) * 20.0, b), x, y, a, b),
        incoming_times_b=_milliseconds(mx, lambda y, b: y @ b.T, y, b),
        gradient_of_b=_milliseconds(mx, lambda z, y: z.T @ y, x @ a, y),
        gradient_of_a=_milliseconds(mx, lambda x, z: x.T @ z, x, x @ a),
        addition=_milliseconds(mx, lambda x, y: x + y, y, y),
    )


def _with_gradient(mx: Any, function: Function) -> Function:
    def both(incoming: Any, *inputs: Any) -> Any:
        return mx.vjp(function, list(inputs), [incoming])

    return both


def _elementwise(mx: Any, rows: int, hidden: int, inner: int) -> None:
    import mlx.nn as nn

    x, weight, gate, up = (_array(mx, *shape) for shape in ((rows, hidden), (hidden,), (rows, inner), (rows, inner)))
    _print(
        "norm and gated activation, forward and backward",
        rows,
        norm=_milliseconds(mx, _with_gradient(mx, lambda x, w: mx.fast.rms_norm(x, w, 1e-5)), x, x, weight),
        norm_frozen=_milliseconds(mx, _with_gradient(mx, lambda x: mx.fast.rms_norm(x, weight, 1e-5)), x, x),
        activation=_milliseconds(mx, _with_gradient(mx, lambda gate, up: nn.silu(gate) * up), gate, gate, up),
        addition=_milliseconds(mx, lambda x, y: x + y, gate, up),
    )


def _attention(mx: Any, rows: int, width: int) -> None:
    from mlxflow.kernels import attention

    length = min(rows, 2048)
    heads, kv_heads = _SHAPE["num_attention_heads"], _SHAPE["num_key_value_heads"]
    q, k, v = (_array(mx, rows // length, count, length, width) for count in (heads, kv_heads, kv_heads))
    scale = width**-0.5

    def plain(q: Any, k: Any, v: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    ours: float | str = "not on this device"
    if hasattr(mx, "cuda") and mx.cuda.is_available() and attention.supports(q, k, v, scale, None):
        ours = _milliseconds(mx, _with_gradient(mx, attention.attention(scale)), q, q, k, v)
    _print(
        f"attention, {rows // length} x {length}, forward and backward",
        rows,
        mlx_forward=_milliseconds(mx, plain, q, k, v),
        mlx=_milliseconds(mx, _with_gradient(mx, plain), q, q, k, v),
        ours=ours,
    )


def _head(mx: Any, rows: int, hidden: int) -> None:
    """Time the head in 4 bits with its loss and gradient: all logits, and some rows' logits at a time."""
    from mlxflow.training import loss

    vocab_size = _SHAPE["vocab_size"]
    weight, x = _quantized(mx, vocab_size, hidden), _array(mx, rows, hidden)
    targets = mx.random.randint(0, vocab_size, (rows,))

    def all_logits(x: Any) -> Any:
        logits = mx.quantized_matmul(x, *weight, group_size=64, bits=4)
        return loss.cross_entropy(logits, targets).sum()

    def fused(chunk_rows: int) -> Function:
        def total(x: Any) -> Any:
            dense = mx.dequantize(*weight, group_size=64, bits=4)
            ones = mx.ones(rows)
            return loss.linear_cross_entropy(x, dense, targets, ones, chunk_rows=chunk_rows, trains_weight=False)

        return total

    times = {}
    for name, function in {"all_logits": all_logits, **{f"fused_{n}": fused(n) for n in (512, 1024, 2048)}}.items():
        mx.reset_peak_memory()
        times[name] = _milliseconds(mx, mx.value_and_grad(function), x)
        times[f"{name}_peak_gb"] = round((mx.get_peak_memory() - mx.get_active_memory()) / 1e9, 2)
        mx.clear_cache()
    dequantize = _milliseconds(mx, lambda *weight: mx.dequantize(*weight, group_size=64, bits=4), *weight)
    _print(f"head and loss, {vocab_size} x {hidden}", rows, dequantize=dequantize, **times)
