"""The gradient of an embedding lookup: one pass, in a fixed order of additions.

For rows y_n = E[t_n] of a table E with incoming gradients g_n:

    dE_v = sum over n with t_n = v of g_n

The positions n are sorted by t_n first (stable), and the range of each token is found by bisection. The few rows of
most tokens are added up in fp32 by 32 threads each. The rows of a frequent token are split over a group of threads, and
the partial sums are added in a fixed order. So there are no atomics, two runs are equal to the bit, and no zeros are
written first. MLX's implementation uses atomics; verification compares with `mlxflow.ops.embedding_lookup` instead.

| takes | |
| --- | --- |
| g | fp32 or bf16, (N, D), D a multiple of 8, less than 2^31 numbers |
| t | any integer type, (N,), from 0 to V - 1; V D less than 2^31 |
"""

import mlx.core as mx

from mlxflow.kernels.codegen import THREADS, KernelSource
from mlxflow.ops.embedding_lookup import by_number

_BOUNDS = KernelSource(
    name="bounds",
    inputs=("t",),
    outputs=("begins", "ends"),
    body="""
  const int number = group * THREADS + worker, count = t_size;
  if (number < NUMBERS) {
    int begin = 0, most = count;
    while (begin < most) {
      const int middle = (begin + most) / 2;
      if (t[middle] < number) begin = middle + 1;
      else most = middle;
    }
    int end = begin;
    most = count;
    while (end < most) {
      const int middle = (end + most) / 2;
      if (t[middle] <= number) end = middle + 1;
      else most = middle;
    }
    begins[number] = begin;
    ends[number] = end;
  }
""",
)

_SOURCE = KernelSource(
    name="embedding_backward",
    inputs=("g", "n", "begins", "ends"),
    outputs=("de",),
    header="""
enum { FEW = 16, AT_ONCE = 8 };  // a variable of a program must be in constant memory on Metal
template <typename G, typename N> INLINE void add_rows(G g, N n, int vector, int vectors, int begin, int end, int step,
                                                       LOCAL float (&sums)[8]) {
  for (int at = begin; at < end; at += step) {
    float rows[AT_ONCE][8];
    for (int i = 0; i < AT_ONCE; ++i) {
      if (at + i < end) read_8(g + (n[at + i] * vectors + vector) * 8, rows[i]);
      else for (int j = 0; j < 8; ++j) rows[i][j] = 0;
    }
    for (int i = 0; i < AT_ONCE; ++i) for (int j = 0; j < 8; ++j) sums[j] += rows[i][j];
  }
}
""",
    body="""
  constexpr int SHARED_BY = THREADS / 32;
  const int vectors = g_width / 8, first = group * SHARED_BY;
  const int mine = first + worker / 32;
  if (mine < NUMBERS && ends[mine] - begins[mine] <= FEW) {
    for (int vector = worker % 32; vector < vectors; vector += 32) {
      float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      add_rows(g, n, vector, vectors, begins[mine], ends[mine], AT_ONCE, sums);
      write_8(de + (mine * vectors + vector) * 8, sums);
    }
  }
  SHARED float shares[THREADS * 8];
  const bool is_narrow = vectors < THREADS;
  const int slots = is_narrow ? THREADS / vectors : 1;
  const int slot = is_narrow ? worker / vectors : 0;
  for (int number = first; number < first + SHARED_BY && number < NUMBERS; ++number) {
    const int begin = begins[number], end = ends[number];
    if (end - begin <= FEW) continue;
    for (int base = 0; base < vectors; base += THREADS) {
      const int vector = is_narrow ? worker % vectors : base + worker;
      const bool takes_part = slot < slots && vector < vectors;
      float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (takes_part) add_rows(g, n, vector, vectors, begin + slot * AT_ONCE, end, slots * AT_ONCE, sums);
      BARRIER;
      for (int j = 0; j < 8; ++j) shares[worker * 8 + j] = sums[j];
      BARRIER;
      if (takes_part && slot == 0) {
        for (int other = 1; other < slots; ++other)
          for (int j = 0; j < 8; ++j) sums[j] += shares[(other * vectors + vector) * 8 + j];
        write_8(de + (number * vectors + vector) * 8, sums);
      }
    }
  }
""",
)


def reference_gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
    """Return the sum of the incoming gradients of each row, (V, D), in plain operations, computed in fp32."""
    sums = mx.zeros((count, incoming.shape[1]), mx.float32).at[numbers].add(incoming.astype(mx.float32))
    return sums.astype(incoming.dtype)


def supports(incoming: mx.array, count: int) -> bool:
    """Return whether the kernel takes rows of this shape and type for a table with this number of rows."""
    is_supported = incoming.dtype in (mx.float32, mx.bfloat16) and incoming.ndim == 2 and incoming.shape[1] % 8 == 0
    return is_supported and max(len(incoming), count) * incoming.shape[1] < 2**31 and incoming.size > 0


def kernel_gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
    """Return what `reference_gradient` does, by the kernel."""
    sorted_ids, order = by_number(numbers, count)
    numbered = [("NUMBERS", count)]
    begins, ends = _BOUNDS.launch(
        [sorted_ids],
        constants=numbered,
        groups=-(-count // THREADS),
        shapes=[(count,), (count,)],
        dtypes=[mx.int32, mx.int32],
    )
    (gradient,) = _SOURCE.launch(
        [incoming, order, begins, ends],
        constants=numbered,
        groups=-(-count // (THREADS // 32)),
        shapes=[(count, incoming.shape[1])],
        dtypes=[incoming.dtype],
    )
    return gradient
