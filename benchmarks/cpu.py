"""What mlxflow does for MLX's CPU backend, each row against MLX as it comes, in turns in the same run.

    python benchmarks/cpu.py

- blas: one 1024 x 1024 fp32 matrix product, OpenBLAS against the wheel's own BLAS (a process each);
- core: the same, OpenBLAS as mlxflow loads it against the code that OpenBLAS chooses itself, which is old code for a
  processor that it does not know;
- loss: cross-entropy with its gradient over (2048, 2048) logits, ours against `mlx.nn.losses.cross_entropy`;
- exponential: of (512, 2048) numbers, ours against `mx.exp`;
- attention: causal, with its gradients, 2 rows of 2,048 tokens, 2 heads of 64, ours against `mx.fast`;
- SwiGLU: with its gradients, (4096, 512), ours against mlx-lm's;
- quantized: product of 512 rows with a 4-bit weight, (1536, 576) in groups of 64, and the gradient of the rows, in fp32
  and bf16, ours against `mx.quantized_matmul`;
- denormals: matrix product of attention probabilities as a trained model has them, denormals flushed and not.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

ROUNDS = 7

MATMUL = """
import time
{prepare}
import mlx.core as mx
mx.set_default_device(mx.cpu)
a = mx.random.normal((1024, 1024), key=mx.random.key(0))
mx.eval(a @ a)
seconds = []
for _ in range(5):
    begin = time.perf_counter()
    mx.eval(a @ a)
    seconds.append(time.perf_counter() - begin)
print(sorted(seconds)[2])
"""

SMALL_NUMBERS = """
import time
{prepare}
import mlx.core as mx
mx.set_default_device(mx.cpu)
a = mx.random.normal((1024, 1024), key=mx.random.key(0)) * 1e-20
b = mx.random.normal((1024, 1024), key=mx.random.key(1)) * 1e-20
mx.eval(a * b)
seconds = []
for _ in range(5):
    begin = time.perf_counter()
    mx.eval(a * b)
    seconds.append(time.perf_counter() - begin)
print(sorted(seconds)[2])
"""

PREPARE = "from mlxflow.device import cpu_backend; cpu_backend.prepare()"
OWN_CORE = "import ctypes; ctypes.CDLL('libopenblas.so.0', ctypes.RTLD_GLOBAL)"
BLAS_ONLY = "from mlxflow.device import cpu_backend; cpu_backend._load_blas()"


def main() -> None:
    """Print a line for each row: medians and the ratio."""
    compare_processes("blas: matrix product", MATMUL, PREPARE, "")
    compare_processes("core: matrix product", MATMUL, PREPARE, OWN_CORE)
    compare_processes("denormals: elementwise product", SMALL_NUMBERS, PREPARE, BLAS_ONLY)
    compare_arithmetic()


def compare_processes(name: str, script: str, ours: str, theirs: str) -> None:
    """Run a script in fresh processes, in turns, with two ways to prepare."""
    pairs = [(_seconds(script.format(prepare=ours)), _seconds(script.format(prepare=theirs))) for _ in range(ROUNDS)]
    _report(name, pairs)


def compare_arithmetic() -> None:
    """Time what is computed another way, with gradients where it has some, compiled, in this process."""
    from mlxflow.device import cpu_backend
    from mlxflow.ops import mlx_lm_import

    cpu_backend.prepare()
    mlx_lm_import.prepare()
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import activations

    from mlxflow.ops.blockwise_attention import causal_attention
    from mlxflow.ops.fast_exp import LOG2_E, exp2
    from mlxflow.ops.swiglu_cpu import swiglu
    from mlxflow.training.loss import cross_entropy

    mx.set_default_device(mx.cpu)
    logits = mx.random.normal((2048, 2048), key=mx.random.key(0))
    targets = mx.random.randint(0, 2048, (2048,), key=mx.random.key(1))

    def with_gradients(function: Callable[..., mx.array], count: int) -> Callable[..., object]:
        def loss(*inputs: mx.array) -> mx.array:
            return function(*inputs).sum()

        return mx.compile(mx.value_and_grad(loss, argnums=tuple(range(count))))

    _compare(
        "loss: cross-entropy with gradient",
        with_gradients(partial(cross_entropy, targets=targets), 1),
        with_gradients(partial(nn.losses.cross_entropy, targets=targets), 1),
        logits,
    )

    def exponential(x: mx.array) -> mx.array:
        return exp2(x * LOG2_E)

    _compare("exponential", mx.compile(exponential), mx.exp, logits[:512])
    rows = [mx.random.normal((2, 2, 2048, 64), key=mx.random.key(number)) for number in range(3)]
    _compare(
        "attention: causal, with gradients",
        with_gradients(partial(causal_attention, scale=0.125), 3),
        with_gradients(partial(mx.fast.scaled_dot_product_attention, scale=0.125, mask="causal"), 3),
        *rows,
    )
    pair = [mx.random.normal((4096, 512), key=mx.random.key(number)) for number in range(2)]
    _compare("SwiGLU, with gradients", with_gradients(swiglu, 2), with_gradients(activations.swiglu, 2), *pair)
    compare_quantized_products(with_gradients)


def compare_quantized_products(with_gradients: Callable[[Callable[..., Any], int], Callable[..., object]]) -> None:
    """Time products of many rows with packed codes."""
    import mlx.core as mx

    from mlxflow.ops import quantized_matmul

    def product(matmul: Callable[..., mx.array], codes: mx.array, *scales: mx.array) -> Callable[..., mx.array]:
        return lambda x: matmul(x, codes, *scales, group_size=64, bits=4)

    plain = mx.quantized_matmul
    quantized_matmul.install()
    for dtype in (mx.float32, mx.bfloat16):
        weight = mx.quantize(mx.random.normal((1536, 576), key=mx.random.key(0)).astype(dtype), group_size=64, bits=4)
        rows = mx.random.normal((512, 576), key=mx.random.key(1)).astype(dtype)
        mx.eval(weight)
        ours, theirs = (with_gradients(product(matmul, *weight), 1) for matmul in (mx.quantized_matmul, plain))
        _compare(f"quantized: product and gradient, {dtype}", ours, theirs, rows)
    quantized_matmul.uninstall()


def _compare(name: str, ours: Callable[..., object], theirs: Callable[..., object], *inputs: object) -> None:
    import mlx.core as mx

    mx.eval(inputs, ours(*inputs), theirs(*inputs))
    _report(
        name, [(_time(lambda: mx.eval(ours(*inputs))), _time(lambda: mx.eval(theirs(*inputs)))) for _ in range(ROUNDS)]
    )


def _seconds(script: str) -> float:
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(run.stdout)


def _time(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _report(name: str, pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    ratio = statistics.median(their / our for our, their in pairs)
    print(f"{name:36} mlxflow {ours:8.2f} ms   MLX alone {theirs:8.2f} ms   {ratio:5.1f} times as fast")


if __name__ == "__main__":
    main()
