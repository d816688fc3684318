"""The rotary position embedding, forward and backward (Su et al. 2021, arXiv:2104.09864).

For a pair of numbers (a, b) of a head at a position, with that position's cosine c and sine s of the pair's angle:

    a' = a c - b s          b' = b c + a s

The gradient is the rotation back: the same with -s. A pair is i and i + D / 2, or, interleaved, 2 i and 2 i + 1.
Cosines and sines are the result of the model's own layer for ones and zeros, for any frequencies and scales.

Queries and keys come as a projection made them, (B, L, H, E) seen as (B, H, L, E). The kernel reads and writes them
in that order, so that nothing is copied: neither here, nor before the attention, nor after it. A thread turns the same
pairs of all heads of a position.

| takes | |
| --- | --- |
| x | fp32 or bf16, (B, H, L, E), E a multiple of 8, D <= E of them rotated, a multiple of 16; less than 2^31 numbers |
| c, s | fp32, (L, D / 2) |
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.kernels.codegen import THREADS, KernelSource
from mlxflow.ops.custom_function import custom_function

_SOURCE = KernelSource(
    name="rotary",
    inputs=("x", "c", "s"),
    outputs=("y",),
    body="""
  constexpr int VECTORS = HALF / 8;
  const int heads = x_width / WIDTH, rows = x_size / x_width, length = c_size / HALF;
  const int at = group * THREADS + worker;
  const int row = at / VECTORS, vector = at % VECTORS;
  if (row < rows) {
    float cs[8], ss[8];
    read_8(c + ((row % length) * VECTORS + vector) * 8, cs);
    read_8(s + ((row % length) * VECTORS + vector) * 8, ss);
    if (BACK) for (int i = 0; i < 8; ++i) ss[i] = -ss[i];
    for (int head = 0; head < heads; ++head) {
      const int begin = (row * heads + head) * WIDTH;
      const int one = begin + vector * (INTERLEAVED ? 16 : 8), other = one + (INTERLEAVED ? 8 : HALF);
      float as[8], bs[8];
      read_8(x + one, as);
      read_8(x + other, bs);
      if (INTERLEAVED) {
        for (int i = 0; i < 4; ++i) {
          const float a = as[2 * i], b = as[2 * i + 1], d = bs[2 * i], e = bs[2 * i + 1];
          as[2 * i] = a * cs[i] - b * ss[i];
          as[2 * i + 1] = b * cs[i] + a * ss[i];
          bs[2 * i] = d * cs[i + 4] - e * ss[i + 4];
          bs[2 * i + 1] = e * cs[i + 4] + d * ss[i + 4];
        }
      } else {
        for (int i = 0; i < 8; ++i) {
          const float a = as[i], b = bs[i];
          as[i] = a * cs[i] - b * ss[i];
          bs[i] = b * cs[i] + a * ss[i];
        }
      }
      write_8(y + one, as);
      write_8(y + other, bs);
      for (int rest = 2 * HALF + vector * 8; rest < WIDTH; rest += HALF) {
        read_8(x + begin + rest, as);
        write_8(y + begin + rest, as);
      }
    }
  }
""",
)


def pairs(x: mx.array, *, interleaved: bool) -> tuple[mx.array, mx.array]:
    """Return the first and the second elements of all pairs, (..., D / 2) each, of rotated dimensions, (..., D)."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def ones_and_zeros(width: int, length: int, *, interleaved: bool) -> mx.array:
    """Return the input that a rotary layer turns into cosines and sines, (1, 1, L, D): pairs of one and zero."""
    places = mx.arange(width)
    one = places % 2 == 0 if interleaved else places < width // 2
    # no view: MLX gives a rotary embedding's result the strides of its input on CUDA, and writes one row over all
    return mx.contiguous(mx.broadcast_to(one.astype(mx.float32), (1, 1, length, width)))


def reference(x: mx.array, cosine: mx.array, sine: mx.array, interleaved: bool, back: bool) -> mx.array:
    """Return x, (B, H, L, E), rotated, or rotated back, in plain operations, computed in fp32."""
    width = 2 * cosine.shape[-1]
    axis = -1 if interleaved else -2  # of pairs in (..., D / 2, 2) or (..., 2, D / 2)
    a, b = (mx.expand_dims(one, axis) for one in pairs(x[..., :width].astype(mx.float32), interleaved=interleaved))
    cosine, sine = (mx.expand_dims(one, axis) for one in (cosine, -sine if back else sine))
    first, second = (mx.array(one).reshape(2, *[1] * (-1 - axis)) for one in ([1.0, 0.0], [0.0, 1.0]))
    # not concatenated: MLX's operations for that take longer to load on CUDA than most kernels to verify
    turned = a * (cosine * first + sine * second) + b * (cosine * second - sine * first)
    rotated = turned.flatten(-2).astype(x.dtype)
    return rotated if width == x.shape[-1] else mx.concatenate([rotated, x[..., width:]], axis=-1)


def supports(x: mx.array, width: int) -> bool:
    """Return whether the kernel takes arrays of this shape and dtype with `width` rotated dimensions."""
    is_supported = x.dtype in (mx.float32, mx.bfloat16) and x.ndim == 4 and x.shape[-1] % 8 == 0 and width % 16 == 0
    return is_supported and 0 < width <= x.shape[-1] and 0 < x.size < 2**31


def kernel(x: mx.array, cosine: mx.array, sine: mx.array, interleaved: bool, back: bool) -> mx.array:
    """Return what `reference` does, by the kernel, in memory (B, L, H, E)."""
    batch, heads, length, width = x.shape
    half = cosine.shape[-1]
    rows = x.transpose(0, 2, 1, 3).reshape(batch * length, heads * width)
    (rotated,) = _SOURCE.launch(
        [rows, cosine, sine],
        constants=[("HALF", half), ("WIDTH", width), ("INTERLEAVED", interleaved), ("BACK", back)],
        groups=-(-(batch * length * (half // 8)) // THREADS),
        shapes=[rows.shape],
        dtypes=[x.dtype],
    )
    return rotated.reshape(batch, length, heads, width).transpose(0, 2, 1, 3)


@functools.cache
def rotary(interleaved: bool, kernel_dtype: mx.Dtype) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return a function of x, cosines and sines that is differentiable in x.

    Args:
        interleaved: whether a pair is 2 i and 2 i + 1, not i and i + D / 2.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
    """

    def turn(x: mx.array, cosine: mx.array, sine: mx.array, *, back: bool) -> mx.array:
        uses_kernel = x.dtype == kernel_dtype and supports(x, 2 * cosine.shape[-1])
        return (kernel if uses_kernel else reference)(x, cosine, sine, interleaved, back)

    function = custom_function(functools.partial(turn, back=False))

    @function.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        _, cosine, sine = primals
        return turn(cotangent, cosine, sine, back=True), mx.zeros_like(cosine), mx.zeros_like(sine)

    return cast("Callable[[mx.array, mx.array, mx.array], mx.array]", function)
