"""Fast exponentials for the CPU, by integer arithmetic on the bits of a float, which compilers vectorize.

MLX's CPU backend calls the C library for each exponential, which takes 13 ns a number on x86; this takes 2 ns in the
cache and 4 ns outside (`benchmarks/cpu.py`), at nearly the same accuracy: the largest relative error is 1.8e-7.

2^x = 2^k (1 + m), with k the integer part of x and m in [0, 1) a polynomial in the fraction. The result's exponent and
mantissa are k + 127 and m 2^23, added as an integer and reinterpreted as a float.
"""

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)

# 2^f - 1 on [0, 1], exact at both ends; between, least squares weighted towards the largest errors: 2^f to 9.3e-8
_POLYNOMIAL = (
    0.693151712,
    0.240159273,
    0.0558186732,
    0.00899099745,
    0.00187931734,
)


# The smallest result of `exp2_below` is two to this: less than the rounding error of a sum that contains a 1
_LEAST = -64.0


def exp2(x: mx.array) -> mx.array:
    """Return 2^x in fp32: at least 2^-126, infinite from x = 128 on. Has no gradient.

    Args:
        x: of any shape, in fp32. A NaN gives some number, not NaN: check for it elsewhere.
    """
    bounded = mx.clip(x, -126.0, 128.0)
    toward_zero = bounded.astype(mx.int32)
    whole = toward_zero - (bounded < toward_zero.astype(mx.float32)).astype(mx.int32)
    return _bits(whole, bounded - whole.astype(mx.float32)).view(mx.float32)


def exp2_below(x: mx.array, largest: mx.array, factor: float) -> mx.array:
    """Return 2^((x - largest) factor) in fp32, at least 2^-64. Has no gradient.

    The lower bound keeps products with the result from being denormal, which are a hundred times slower.

    Args:
        x: in fp32; see `exp2`.
        largest: at least every x that it is broadcast against.
        factor: positive.
    """
    below = _kept(mx.minimum((largest - x) * factor, -_LEAST))
    whole = 1 + below.astype(mx.int32)
    # written differently on purpose: `mx.compile` then computes it twice instead of keeping it in memory
    again = (below * 1.0).astype(mx.int32) + 1
    return _bits(-whole, again.astype(mx.float32) - below).view(mx.float32)


def _kept(x: mx.array) -> mx.array:
    """Return an array that `mx.compile` does not fuse with what follows.

    A broadcast inside a fused kernel makes all of the kernel slow: its loops are then not vectorized.
    """
    return x.view(mx.int32).view(mx.float32)


def _bits(whole: mx.array, fraction: mx.array) -> mx.array:
    """Return the bits of 2^(whole + fraction), int32; the fraction is from 0 to 1."""
    mantissa = fraction * _POLYNOMIAL[-1]
    for coefficient in reversed(_POLYNOMIAL[:-1]):
        mantissa = (mantissa + coefficient) * fraction
    exponent = mx.left_shift(whole + 127, mx.array(23, mx.int32))
    return exponent + (mantissa * 2.0**23 + 0.5).astype(mx.int32)
