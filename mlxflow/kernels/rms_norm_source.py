"""Kernel sources of `rms_norm`, for CUDA and Metal: a row is held in the registers of 32 to 256 threads."""

from mlxflow.kernels.codegen import KernelSource

_ROW = """
  constexpr int VECTORS = D / 8, LANES = 32 * WARPS, TIMES = (VECTORS + LANES - 1) / LANES, SLOTS = THREADS / LANES;
  const int lane = worker % LANES, slot = worker / LANES;
  const int rows = x_size / D;
  SHARED float partial[2][THREADS / 32];
"""

_FORWARD_BODY = (
    _ROW
    + """
  const int row = group * SLOTS + slot;
  float xs[TIMES][8];
  float squares = 0;
  for (int t = 0; t < TIMES; ++t) {
    const int vector = lane + t * LANES;
    if (row < rows && vector < VECTORS) {
      read_8(x + (row * VECTORS + vector) * 8, xs[t]);
      AFTER_READING
      for (int i = 0; i < 8; ++i) squares += xs[t][i] * xs[t][i];
    }
  }
  squares = sum_32(squares);
  if (WARPS > 1) {
    partial[0][worker / 32] = squares;
    BARRIER;
    squares = 0;
    for (int i = 0; i < WARPS; ++i) squares += partial[0][slot * WARPS + i];
  }
  const float scale = RSQRT(squares / D + eps[0]);
  for (int t = 0; t < TIMES; ++t) {
    const int vector = lane + t * LANES;
    if (row < rows && vector < VECTORS) {
      float ws[8];
      read_8(w + vector * 8, ws);
      for (int i = 0; i < 8; ++i) xs[t][i] *= scale * ws[i];
      write_8(y + (row * VECTORS + vector) * 8, xs[t]);
    }
  }
"""
)

_BACKWARD_BODY = (
    _ROW
    + """BEGIN_SUMS
  for (int base = group * SLOTS; base < rows; base += groups * SLOTS) {
    const int row = base + slot;
    float xs[TIMES][8], gs[TIMES][8];
    float squares = 0, products = 0;
    for (int t = 0; t < TIMES; ++t) {
      const int vector = lane + t * LANES;
      if (row < rows && vector < VECTORS) {
        read_8(x + (row * VECTORS + vector) * 8, xs[t]);
        read_8(g + (row * VECTORS + vector) * 8, gs[t]);
      } else {
        for (int i = 0; i < 8; ++i) xs[t][i] = gs[t][i] = 0;
      }
    }
    for (int t = 0; t < TIMES; ++t) {
      const int vector = lane + t * LANES;
      if (vector < VECTORS) {
        float ws[8];
        read_8(w + vector * 8, ws);
        for (int i = 0; i < 8; ++i) {
          squares += xs[t][i] * xs[t][i];
          products += xs[t][i] * gs[t][i] * ws[i];
        }
      }
    }
    squares = sum_32(squares);
    products = sum_32(products);
    if (WARPS > 1) {
      BARRIER;
      partial[0][worker / 32] = squares;
      partial[1][worker / 32] = products;
      BARRIER;
      squares = products = 0;
      for (int i = 0; i < WARPS; ++i) {
        squares += partial[0][slot * WARPS + i];
        products += partial[1][slot * WARPS + i];
      }
    }
    const float r = RSQRT(squares / D + eps[0]);
    const float common = products / D * r * r * r;
    for (int t = 0; t < TIMES; ++t) {
      const int vector = lane + t * LANES;
      if (row < rows && vector < VECTORS) {
        float ws[8];
        read_8(w + vector * 8, ws);
        for (int i = 0; i < 8; ++i) {ADD_TO_SUMS
          gs[t][i] = gs[t][i] * ws[i] * r - xs[t][i] * common;
        }
        BEFORE_WRITING
        write_8(dx + (row * VECTORS + vector) * 8, gs[t]);
      }
    }
  }
WRITE_SUMS"""
)

# The parts of the backward pass that add up the gradient of the weight
_WEIGHT_SUMS = {
    "BEGIN_SUMS": """
  float sums[TIMES][8];
  for (int t = 0; t < TIMES; ++t) for (int i = 0; i < 8; ++i) sums[t][i] = 0;""",
    "ADD_TO_SUMS": """
          sums[t][i] += gs[t][i] * xs[t][i] * r;""",
    "WRITE_SUMS": """  if (SLOTS == 1) {
    for (int t = 0; t < TIMES; ++t) {
      const int vector = lane + t * LANES;
      if (vector < VECTORS) write_8(dw + group * D + vector * 8, sums[t]);
    }
    return;
  }
  SHARED float shares[SLOTS > 1 ? THREADS * 8 : 1];  // of a part of the columns, so that two groups fit a processor
  for (int t = 0; t < TIMES; ++t) {
    const int first = t * LANES * 8, columns = D - first < LANES * 8 ? D - first : LANES * 8;
    BARRIER;
    if (lane * 8 < columns) for (int i = 0; i < 8; ++i) shares[slot * columns + lane * 8 + i] = sums[t][i];
    BARRIER;
    for (int column = worker; column < columns; column += THREADS) {
      float sum = 0;
      for (int i = 0; i < SLOTS; ++i) sum += shares[i * columns + column];
      dw[group * D + first + column] = sum;
    }
  }
""",
}

_ADD_RESIDUAL = """
        float es[8];
        read_8(e + (row * VECTORS + vector) * 8, es);
        for (int i = 0; i < 8; ++i) gs[t][i] += es[i];
"""


def _backward(name: str, inputs: tuple[str, ...], before_writing: str, *, is_frozen: bool) -> KernelSource:
    """Return the source of a backward pass; with a frozen weight nothing is added up or written for it."""
    body = _BACKWARD_BODY.replace("BEFORE_WRITING", before_writing)
    for mark, text in _WEIGHT_SUMS.items():
        body = body.replace(mark, "" if is_frozen else text)
    return KernelSource(name=name, inputs=inputs, outputs=("dx",) if is_frozen else ("dx", "dw"), body=body)


FORWARD = KernelSource(
    name="rms_norm", inputs=("x", "w", "eps"), outputs=("y",), body=_FORWARD_BODY.replace("AFTER_READING", "")
)

BACKWARD = _backward("rms_norm_backward", ("x", "w", "g", "eps"), "", is_frozen=False)
FROZEN_BACKWARD = _backward("rms_norm_frozen_backward", ("x", "w", "g", "eps"), "", is_frozen=True)

# The sum of two arrays, rounded as MLX rounds it, and its norm
SUM_FORWARD = KernelSource(
    name="sum_rms_norm",
    inputs=("x", "r", "w", "eps"),
    outputs=("h", "y"),
    body=_FORWARD_BODY.replace(
        "AFTER_READING",
        """
        float rs[8];
        read_8(r + (row * VECTORS + vector) * 8, rs);
        for (int i = 0; i < 8; ++i) xs[t][i] = static_cast<float>(static_cast<T>(xs[t][i] + rs[i]));
        write_8(h + (row * VECTORS + vector) * 8, xs[t]);
""",
    ),
)

# The gradient through the norm plus the incoming gradient of the residual
_SUM_INPUTS = ("x", "w", "e", "g", "eps")
SUM_BACKWARD = _backward("sum_rms_norm_backward", _SUM_INPUTS, _ADD_RESIDUAL, is_frozen=False)
SUM_FROZEN_BACKWARD = _backward("sum_rms_norm_frozen_backward", _SUM_INPUTS, _ADD_RESIDUAL, is_frozen=True)

ADD_SHARES = KernelSource(
    name="rms_norm_shares",
    inputs=("shares",),
    outputs=("dw",),
    body="""
  constexpr int SLOTS = THREADS / 32;
  const int wide = shares_width, rows = shares_size / wide;
  const int column = group * 32 + worker % 32;
  float sum = 0;
  if (column < wide) for (int row = worker / 32; row < rows; row += SLOTS) sum += shares[row * wide + column];
  SHARED float sums[THREADS];
  sums[worker] = sum;
  BARRIER;
  if (worker < 32 && column < wide) {
    for (int slot = 1; slot < SLOTS; ++slot) sum += sums[slot * 32 + worker];
    dw[column] = static_cast<W>(sum);
  }
""",
)
