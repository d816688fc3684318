"""Roofline ceilings measured on the device: FLOP/s of a large matrix product, and memory bandwidth in bytes/s."""

import time
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

# Rows and columns of the matrices: large enough to saturate the device, small enough to be quick
_PRODUCT = {"gpu": 8192, "cpu": 1024}
_READ = {"gpu": 16384, "cpu": 4096}

_ROUNDS = 5


def flops_ceiling(dtype: mx.Dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of several.

    Args:
        dtype: of the matrices.
    """
    size = _PRODUCT[_kind()]
    one, other = (mx.random.normal((size, size), key=mx.random.key(seed)).astype(dtype) for seed in (0, 1))
    mx.eval(one, other)
    return 2 * size**3 / _fastest(lambda: one @ other)


def bytes_ceiling(dtype: mx.Dtype) -> float:
    """Return the bytes per second that a product of a large matrix and a vector reads, the best of several.

    Args:
        dtype: of the matrix.
    """
    size = _READ[_kind()]
    matrix = mx.random.normal((size, size), key=mx.random.key(0)).astype(dtype)
    vector = mx.ones((1, size), dtype)
    mx.eval(matrix, vector)
    return matrix.nbytes / _fastest(lambda: vector @ matrix.T)


def flops_per_token(parameters: object, *, hidden_size: int, num_layers: int, context_length: int) -> float:
    """Return the FLOP of a training step per token, without recomputation (Chowdhery et al. 2022, appendix B).

    Args:
        parameters: parameter tree of a dense model.
        hidden_size: D.
        num_layers: transformer blocks.
        context_length: L.
    """
    leaves: list[tuple[str, mx.array]] = tree_flatten(parameters)
    has_head = any(name.startswith("lm_head") for name, _ in leaves)
    weights = sum(leaf.size for name, leaf in leaves if leaf.ndim > 1 and not (has_head and "embed_tokens" in name))
    return 6 * weights + 12 * num_layers * hidden_size * context_length


def _kind() -> str:
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def _fastest(compute: Callable[[], mx.array]) -> float:
    taken = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        mx.eval(compute())
        mx.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])
