"""Exponentials on the CPU: from the bits of a float, in operations that a compiler turns into vector instructions.

MLX's CPU backend calls the C library for each exponential, which takes 13 ns a number on x86, this 2 in the cache and 4
outside (`benchmarks/cpu.py`), at nearly the same accuracy: the largest relative error over all x is 1.8e-7.

2^x = 2^k (1 + m) with k the integer part of x and m in [0, 1) a polynomial in the fraction: the exponent and the
mantissa of the result are k + 127 and m 2^23, added up as an integer and looked at as a float.
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


# What `exp2_below` gives at least is two to this: less than the rounding of a sum in which there is a 1
_LEAST = -64.0


def exp2(x: mx.array) -> mx.array:
    """Return 2^x in fp32: 2^-126 at least, infinite from 2^128 on. Has no gradient.

    Args:
        x: of any shape, in fp32. What comes of a NaN is some number: let it show by another way.
    """
    bounded = mx.clip(x, -126.0, 128.0)
    toward_zero = bounded.astype(mx.int32)
    whole = toward_zero - (bounded < toward_zero.astype(mx.float32)).astype(mx.int32)
    return _bits(whole, bounded - whole.astype(mx.float32)).view(mx.float32)


def exp2_below(x: mx.array, largest: mx.array, factor: float) -> mx.array:
    """Return 2^((x - largest) factor) in fp32, 2^-64 at least. Has no gradient.

    Not less, so that no product with one is denormal, over which processors take a hundred times as long.

    Args:
        x: in fp32; see `exp2`.
        largest: no less than any x that it is broadcast against.
        factor: positive.
    """
    below = _kept(mx.minimum((largest - x) * factor, -_LEAST))
    whole = 1 + below.astype(mx.int32)
    # the same in other words: `mx.compile` then computes it twice instead of keeping it in memory
    again = (below * 1.0).astype(mx.int32) + 1
    return _bits(-whole, again.astype(mx.float32) - below).view(mx.float32)


def _kept(x: mx.array) -> mx.array:
    """Return an array that `mx.compile` does not compute together with what follows.

    What is broadcast within a program of its makes all of it slow: its loops then are no vector instructions.
    """
    return x.view(mx.int32).view(mx.float32)


def _bits(whole: mx.array, fraction: mx.array) -> mx.array:
    """Return the bits of 2^(whole + fraction), int32; the fraction is from 0 to 1."""
    mantissa = fraction * _POLYNOMIAL[-1]
    for coefficient in reversed(_POLYNOMIAL[:-1]):
        mantissa = (mantissa + coefficient) * fraction
    exponent = mx.left_shift(whole + 127, mx.array(23, mx.int32))
    return exponent + (mantissa * 2.0**23 + 0.5).astype(mx.int32)
