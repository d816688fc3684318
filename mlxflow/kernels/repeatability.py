"""Whether MLX's own attention gives the same gradients twice, to the bit, on this device.

MLX 0.32.4 computes the gradient of attention on Metal in kernels of its own, and nothing says in which order these add.
So the order is observed: one gradient is computed several times, in the process that verifies kernels and with its
cache. Where it differs, training with `deterministic = true` uses plain operations.
"""

import mlx.core as mx

from mlxflow.kernels.kernel_names import TYPES, name_of
from mlxflow.kernels.verifier_process import VerificationResult

_PREFIX = "mlx_attention"

# Rows, heads of queries and of keys, and tokens: several blocks of queries add to one block of keys
_ROWS, _HEADS, _KEY_HEADS, _LENGTH = 2, 8, 2, 1000
_REPETITIONS = 4

#: Why MLX's attention is not used.
DIFFERS = "two runs of its gradient are not equal to the bit"


def attention_check(dtype: mx.Dtype, width: int, *, is_masked: bool) -> str:
    """Return the name under which the check of MLX's attention is cached.

    Args:
        dtype: of queries, keys and values.
        width: of a head.
        is_masked: whether an array says which keys a query sees; else all up to its own place.
    """
    return f"{_PREFIX}{'_masked' * is_masked}/{name_of(dtype)}/{width}"


def is_check(name: str) -> bool:
    """Return whether a name is that of a check, not of a kernel."""
    return name.startswith(_PREFIX)


def check(name: str) -> VerificationResult:
    """Compute the same gradient several times.

    Args:
        name: of `attention_check`.
    """
    kind, dtype, width = name.split("/")
    first, *others = (_gradients(TYPES[dtype], int(width), is_masked="masked" in kind) for _ in range(_REPETITIONS))
    is_equal = all(_same_bits(one, again) for other in others for one, again in zip(first, other, strict=True))
    return VerificationResult(is_equal, "" if is_equal else DIFFERS)


def _gradients(dtype: mx.Dtype, width: int, *, is_masked: bool) -> list[mx.array]:
    """Return the gradients of queries, keys and values, evaluated."""
    keys = mx.random.split(mx.random.key(0), 4)
    heads = (_HEADS, _KEY_HEADS, _KEY_HEADS, _HEADS)
    arrays = [
        mx.random.normal((_ROWS, count, _LENGTH, width), key=key).astype(dtype)
        for count, key in zip(heads, keys, strict=True)
    ]
    *inputs, incoming = arrays
    places = mx.arange(_LENGTH)
    mask = (places[:, None] >= places) & (places[:, None] - places < _LENGTH // 2) if is_masked else "causal"

    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=width**-0.5, mask=mask)

    _, gradients = mx.vjp(attend, inputs, [incoming])
    mx.eval(gradients)
    return list(gradients)


def _same_bits(one: mx.array, other: mx.array) -> bool:
    numbers = mx.uint32 if one.dtype == mx.float32 else mx.uint16
    return bool(mx.array_equal(one.view(numbers), other.view(numbers)))
