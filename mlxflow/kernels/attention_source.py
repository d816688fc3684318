"""CUDA source of the attention kernels: forward, gradient of the queries, and gradient of keys and values.

A warp multiplies 16 rows with rows in shared memory on the matrix units (`mma.sync`, Ampere and later); exponentials
and products stay in its registers. Shared memory is filled by `cp.async`, the next block while one is computed; a row's
pieces of 16 bytes are swapped by its number, so that eight rows are read from different banks.
"""

from mlxflow.kernels.attention_tiles import HEADER
from mlxflow.kernels.codegen import KernelSource

# The block and head of a group by its number: the last blocks, with the most work, come first
_PLACE = """
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int ROWS = 16 * WARPS, WORKERS = 32 * WARPS, TILE = D <= 64 ? 128 : 256;
  const int length = k_width / (HEADS / SHARED_BY * D), batches = k_size / k_width;
  const int blocks = (length + ROWS - 1) / ROWS, warp = worker / 32, lane = worker % 32;
  const float factor = __int_as_float(SCALE) * 1.4426950408889634f;
"""

_QUERIES = (
    _PLACE
    + """
  const int block = blocks - 1 - group / (batches * HEADS), batch = group / HEADS % batches, head = group % HEADS;
  const int first = block * ROWS, row = first + warp * 16 + lane / 4;
  const long long begin = (long long)batch * length;
  const int stride = HEADS * D, other_stride = HEADS / SHARED_BY * D;
  const long long offset = begin * stride + head * D, other_offset = begin * other_stride + head / SHARED_BY * D;
  const long long row_offset = ((long long)batch * HEADS + head) * length;
  const int last = min(first + ROWS, length), tiles = (last + KEYS - 1) / KEYS, begins = LOW(begin + first) / KEYS;
  int lows[2];
  UNROLL for (int half = 0; half < 2; ++half) lows[half] = row + half * 8 < length ? LOW(begin + row + half * 8) : 0;
  const int lowest = LOW(begin + min(first + warp * 16, length - 1));  // of the warp's rows
"""
)


def _sources(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], body: str
) -> tuple[KernelSource, KernelSource]:
    """Return a kernel for queries that see all keys before them, and one for those that see the last of these."""
    unbounded, bounded = "#define BOUNDED false\n#define LOW(at) 0\n", "#define BOUNDED true\n#define LOW(at) low[at]\n"
    return (
        KernelSource(name, inputs, outputs, body, unbounded + HEADER),
        KernelSource(f"{name}_bounded", (*inputs, "low"), outputs, body, bounded + HEADER),
    )


FORWARD = _sources(
    "attention",
    ("q", "k", "v"),
    ("o", "lse"),
    _QUERIES
    + """
  const unsigned queries = shared_address(memory), keys = queries + ROWS * TILE, values = keys + 2 * KEYS * TILE;
  load<D, ROWS, WORKERS>(queries, q + offset, first, length, stride, worker);
  load<D, KEYS, WORKERS>(keys, k + other_offset, begins * KEYS, length, other_stride, worker);
  load<D, KEYS, WORKERS>(values, v + other_offset, begins * KEYS, length, other_stride, worker);
  unsigned a[D / 16][4];
  float out[D / 8][4] = {}, largest[2] = {-INFINITE, -INFINITE}, sums[2] = {0, 0};
  for (int tile = begins; tile < tiles; ++tile) {
    copies_end();
    __syncthreads();
    const unsigned at = (tile - begins) % 2 * KEYS * TILE, next = KEYS * TILE - at;
    if (tile == begins) hold<D>(a, queries, warp * 16, lane);
    if (tile + 1 < tiles) {
      load<D, KEYS, WORKERS>(keys + next, k + other_offset, (tile + 1) * KEYS, length, other_stride, worker);
      load<D, KEYS, WORKERS>(values + next, v + other_offset, (tile + 1) * KEYS, length, other_stride, worker);
    }
    if (tile * KEYS > first + warp * 16 + 15 || tile * KEYS + KEYS <= lowest) continue;
    float s[KEYS / 8][4];
    by_rows<D, KEYS / 8, true>(s, a, queries, warp * 16, keys + at, 0, lane);
    if (BOUNDED || tile * KEYS + KEYS > first + warp * 16) {
      UNROLL for (int n = 0; n < KEYS / 8; ++n) UNROLL for (int i = 0; i < 4; ++i) {
        const int key = tile * KEYS + n * 8 + lane % 4 * 2 + i % 2;
        if (key > row + i / 2 * 8 || key < lows[i / 2]) s[n][i] = -INFINITE;
      }
    }
    UNROLL for (int half = 0; half < 2; ++half) {
      float most = largest[half];
      UNROLL for (int n = 0; n < KEYS / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float known = most > -INFINITE ? most : 0;  // a row may see none of a block's keys
      const float less = exp2_of((largest[half] - known) * factor), subtracted = known * factor;
      largest[half] = most;
      sums[half] *= less;
      UNROLL for (int n = 0; n < D / 8; ++n) { out[n][2 * half] *= less; out[n][2 * half + 1] *= less; }
      UNROLL for (int n = 0; n < KEYS / 8; ++n) UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = exp2_of(s[n][i] * factor - subtracted);
        sums[half] += s[n][i];
      }
    }
    by_columns<D, KEYS / 8>(out, s, values + at, 0, lane);
  }
  UNROLL for (int half = 0; half < 2; ++half) {
    sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 1);
    sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 2);
    if (lane % 4 == 0 && row + half * 8 < length)
      lse[row_offset + row + half * 8] = largest[half] * factor + log2_of(sums[half]);
  }
  store<D>(o + offset, out, 1 / sums[0], 1 / sums[1], queries, warp * 16, first + warp * 16, length, stride, lane);
""",
)

BACKWARD_QUERIES = _sources(
    "attention_backward_queries",
    ("q", "k", "v", "o", "g", "lse"),
    ("dq", "delta"),
    _QUERIES
    + """
  const unsigned queries = shared_address(memory), incoming = queries + ROWS * TILE;
  const unsigned keys = incoming + ROWS * TILE, values = keys + 2 * KEYS * TILE;
  load<D, ROWS, WORKERS>(queries, q + offset, first, length, stride, worker);
  load<D, ROWS, WORKERS>(incoming, g + offset, first, length, stride, worker);
  load<D, KEYS, WORKERS>(keys, k + other_offset, begins * KEYS, length, other_stride, worker);
  load<D, KEYS, WORKERS>(values, v + other_offset, begins * KEYS, length, other_stride, worker);
  float deltas[2], logs[2];
  {
    const int mine = first + warp * 16 + lane / 2;  // two threads a row
    float sum = 0;
    if (mine < length) {
      const long long at = offset + (long long)mine * stride + lane % 2 * (D / 2);
      UNROLL for (int i = 0; i < D / 2; i += 8) {
        float x[8], y[8];
        read_8(o + at + i, x);
        read_8(g + at + i, y);
        UNROLL for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (lane % 2 == 0 && mine < length) delta[row_offset + mine] = sum;
    UNROLL for (int half = 0; half < 2; ++half) {
      deltas[half] = __shfl_sync(0xffffffffu, sum, lane / 4 * 2 + half * 16);
      logs[half] = row + half * 8 < length ? lse[row_offset + row + half * 8] : INFINITE;
    }
  }
  unsigned a[D / 16][4], b[D / 16][4];
  float found[D / 8][4] = {};
  for (int tile = begins; tile < tiles; ++tile) {
    copies_end();
    __syncthreads();
    const unsigned at = (tile - begins) % 2 * KEYS * TILE, next = KEYS * TILE - at;
    if (HOLDS && tile == begins) {
      hold<D>(a, queries, warp * 16, lane);
      hold<D>(b, incoming, warp * 16, lane);
    }
    if (tile + 1 < tiles) {
      load<D, KEYS, WORKERS>(keys + next, k + other_offset, (tile + 1) * KEYS, length, other_stride, worker);
      load<D, KEYS, WORKERS>(values + next, v + other_offset, (tile + 1) * KEYS, length, other_stride, worker);
    }
    LOOP for (int part = 0; part < KEYS; part += PART) {
      const int key = tile * KEYS + part;
      if (key > first + warp * 16 + 15 || key + PART <= lowest) continue;
      float s[PART / 8][4], d[PART / 8][4];
      by_rows<D, PART / 8, HOLDS>(s, a, queries, warp * 16, keys + at, part, lane);
      by_rows<D, PART / 8, HOLDS>(d, b, incoming, warp * 16, values + at, part, lane);
      const bool masks = BOUNDED || key + PART > first + warp * 16;
      UNROLL for (int n = 0; n < PART / 8; ++n) UNROLL for (int i = 0; i < 4; ++i) {
        const int column = key + n * 8 + lane % 4 * 2 + i % 2;
        const bool sees = !masks || (column <= row + i / 2 * 8 && column >= lows[i / 2]);
        d[n][i] = (sees ? exp2_of(s[n][i] * factor - logs[i / 2]) : 0.0f) * (d[n][i] - deltas[i / 2]);
      }
      by_columns<D, PART / 8>(found, d, keys + at, part, lane);
    }
  }
  const float scale = __int_as_float(SCALE);
  store<D>(dq + offset, found, scale, scale, queries, warp * 16, first + warp * 16, length, stride, lane);
""",
)

BACKWARD_KEYS = _sources(
    "attention_backward_keys",
    ("q", "k", "v", "g", "lse", "delta"),
    ("dk", "dv"),
    _PLACE
    + """
  constexpr int SHARING = HEADS / SHARED_BY;
  const int block = group / (batches * SHARING), batch = group / SHARING % batches, head = group % SHARING;
  const int first = block * ROWS;
  const long long begin = (long long)batch * length;
  const int stride = SHARING * D, other_stride = HEADS * D;
  const long long offset = begin * stride + head * D;
  const unsigned keys = shared_address(memory), values = keys + ROWS * TILE;
  const unsigned queries = values + ROWS * TILE, incoming = queries + 2 * QUERIES * TILE;
  float* logs = reinterpret_cast<float*>(memory + 2 * ROWS * TILE + 4 * QUERIES * TILE);
  float* deltas = logs + 2 * QUERIES;
  int* lows = reinterpret_cast<int*>(deltas + 2 * QUERIES);
  load<D, ROWS, WORKERS>(keys, k + offset, first, length, stride, worker);
  load<D, ROWS, WORKERS>(values, v + offset, first, length, stride, worker);
  const int begins = first / QUERIES;
  int each = (length + QUERIES - 1) / QUERIES - begins;
  if (BOUNDED) {  // blocks of queries up to the last that sees one of these keys
    int seeing = 0;
    for (int i = lane; i < each; i += 32) seeing += LOW(begin + (begins + i) * QUERIES) < first + ROWS;
    for (int step = 16; step > 0; step >>= 1) seeing += __shfl_xor_sync(0xffffffffu, seeing, step);
    each = seeing;
  }
  const int tiles = SHARED_BY * each;
  auto next_tile = [&](int tile, int buffer) {
    const int which = head * SHARED_BY + tile / each, from = (begins + tile % each) * QUERIES;
    const long long other_offset = begin * other_stride + which * D;
    load<D, QUERIES, WORKERS>(queries + buffer * QUERIES * TILE, q + other_offset, from, length, other_stride, worker);
    load<D, QUERIES, WORKERS>(incoming + buffer * QUERIES * TILE, g + other_offset, from, length, other_stride, worker);
    const long long row_offset = ((long long)batch * HEADS + which) * length;
    for (int i = worker; i < QUERIES; i += WORKERS) {
      const bool is_there = from + i < length;
      logs[buffer * QUERIES + i] = is_there ? lse[row_offset + from + i] : INFINITE;
      deltas[buffer * QUERIES + i] = is_there ? delta[row_offset + from + i] : 0.0f;
      if (BOUNDED) lows[buffer * QUERIES + i] = is_there ? LOW(begin + from + i) : 0;
    }
  };
  next_tile(0, 0);
  unsigned a[D / 16][4], b[D / 16][4];
  float for_keys[D / 8][4] = {}, for_values[D / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copies_end();
    __syncthreads();
    const int buffer = tile % 2;
    const unsigned at = buffer * QUERIES * TILE;
    if (HOLDS && tile == 0) {
      hold<D>(a, keys, warp * 16, lane);
      hold<D>(b, values, warp * 16, lane);
    }
    if (tile + 1 < tiles) next_tile(tile + 1, 1 - buffer);
    LOOP for (int part = 0; part < QUERIES; part += PART) {
      const int query = (begins + tile % each) * QUERIES + part, key = first + warp * 16;
      if (query + PART <= key) continue;
      float s[PART / 8][4], d[PART / 8][4];
      by_rows<D, PART / 8, HOLDS>(s, a, keys, warp * 16, queries + at, part, lane);
      const bool masks = BOUNDED || query < key + 15;
      UNROLL for (int n = 0; n < PART / 8; ++n) UNROLL for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        const int own = key + lane / 4 + i / 2 * 8;
        const bool is_late = BOUNDED && own < lows[buffer * QUERIES + part + column];
        const bool sees = !masks || (own <= query + column && !is_late);
        s[n][i] = sees ? exp2_of(s[n][i] * factor - logs[buffer * QUERIES + part + column]) : 0.0f;
      }
      by_rows<D, PART / 8, HOLDS>(d, b, values, warp * 16, incoming + at, part, lane);
      by_columns<D, PART / 8>(for_values, s, incoming + at, part, lane);
      UNROLL for (int n = 0; n < PART / 8; ++n) UNROLL for (int i = 0; i < 4; ++i)
        d[n][i] = s[n][i] * (d[n][i] - deltas[buffer * QUERIES + part + n * 8 + lane % 4 * 2 + i % 2]);
      by_columns<D, PART / 8>(for_keys, d, queries + at, part, lane);
    }
  }
  const float scale = __int_as_float(SCALE);
  store<D>(dk + offset, for_keys, scale, scale, keys, warp * 16, first + warp * 16, length, stride, lane);
  store<D>(dv + offset, for_values, 1, 1, values, warp * 16, first + warp * 16, length, stride, lane);
""",
)
