"""CUDA device functions of the attention kernels: tiles in shared memory and their products on the tensor cores.

A warp multiplies 16 rows with rows in shared memory (`mma.sync`, Ampere and later). Shared memory is filled by
`cp.async`; the 16-byte pieces of a row are permuted by the row's number, so that eight rows are read from different
banks.
"""

#: Included before every attention kernel.
HEADER = """
#define UNROLL _Pragma("unroll")
#define LOOP _Pragma("unroll 1")
#define INFINITE 1e30f
INLINE unsigned shared_address(const void* from) {
  unsigned found;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(found) : "l"(from));
  return found;
}
INLINE void copy_16(unsigned to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
INLINE void copies_end() { asm volatile("cp.async.commit_group;\\ncp.async.wait_group 0;" ::: "memory"); }
INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float log2_of(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE unsigned packed(float low, float high) {
  unsigned two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
INLINE float low_of(unsigned two) { return __uint_as_float(two << 16); }
INLINE float high_of(unsigned two) { return __uint_as_float(two & 0xffff0000u); }
INLINE void read_matrices(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}
INLINE void read_transposed(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}
INLINE void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b, unsigned d) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(d));
}
INLINE unsigned short bits_of(bfloat16 x) { return reinterpret_cast<const unsigned short&>(x); }
// Where 16 bytes of a row of D numbers lie
template <int D> INLINE unsigned place(unsigned tile, int row, int piece) {
  return tile + row * (D <= 64 ? 128 : 256) + ((piece ^ (row & 7)) << 4);
}
// Begin to read rows of a tile; those past the end are zero. A view may begin anywhere
template <int D, int ROWS, int WORKERS>
INLINE void load(unsigned tile, const bfloat16* from, int first, int length, int stride, int worker) {
  if (reinterpret_cast<unsigned long long>(from) % 16 == 0) {
    UNROLL for (int i = 0; i < ROWS * (D / 8); i += WORKERS) {
      const int at = i + worker, row = at / (D / 8), piece = at % (D / 8);
      if (ROWS * (D / 8) % WORKERS != 0 && at >= ROWS * (D / 8)) break;
      const bool is_there = first + row < length;
      const bfloat16* begin = from + (is_there ? (long long)(first + row) * stride + piece * 8 : 0);
      copy_16(place<D>(tile, row, piece), begin, is_there);
    }
    return;
  }
  LOOP for (int at = worker; at < ROWS * D; at += WORKERS) {
    const int row = at / D, column = at % D;
    const unsigned short x = first + row < length ? bits_of(from[(long long)(first + row) * stride + column]) : 0;
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(place<D>(tile, row, column / 8) + column % 8 * 2), "h"(x) : "memory");
  }
}
// The 16 rows of a tile as the first factor of a product
template <int D> INLINE void hold(unsigned (&a)[D / 16][4], unsigned tile, int row, int lane) {
  UNROLL for (int k = 0; k < D / 16; ++k) read_matrices(a[k], place<D>(tile, row + lane % 16, 2 * k + lane / 16));
}
// c (16, 8 N) = a (16, D), held or else read from its tile, times rows of another tile, (8 N, D), transposed
template <int D, int N, bool HELD>
INLINE void by_rows(float (&c)[N][4], unsigned (&a)[D / 16][4], unsigned own, int own_row, unsigned tile, int row,
                    int lane) {
  UNROLL for (int n = 0; n < N; ++n) UNROLL for (int i = 0; i < 4; ++i) c[n][i] = 0;
  UNROLL for (int k = 0; k < D / 16; ++k) {
    if (!HELD) read_matrices(a[k], place<D>(own, own_row + lane % 16, 2 * k + lane / 16));
    UNROLL for (int n = 0; n < N; n += 2) {
      unsigned b[4];
      read_matrices(b, place<D>(tile, row + n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      multiply(c[n], a[k], b[0], b[1]);
      multiply(c[n + 1], a[k], b[2], b[3]);
    }
  }
}
// c (16, D) += x (16, 8 N), rounded, times rows of a tile, (8 N, D)
template <int D, int N>
INLINE void by_columns(float (&c)[D / 8][4], const float (&x)[N][4], unsigned tile, int row, int lane) {
  UNROLL for (int k = 0; k < N; k += 2) {
    const unsigned a[4] = {packed(x[k][0], x[k][1]), packed(x[k][2], x[k][3]), packed(x[k + 1][0], x[k + 1][1]),
                           packed(x[k + 1][2], x[k + 1][3])};
    UNROLL for (int n = 0; n < D / 8; n += 2) {
      unsigned b[4];
      read_transposed(b, place<D>(tile, row + k * 8 + lane % 16, n + lane / 16));
      multiply(c[n], a, b[0], b[1]);
      multiply(c[n + 1], a, b[2], b[3]);
    }
  }
}
// Write 16 rows, times a factor of the upper and of the lower eight, through rows of a tile that no other warp reads
template <int D>
INLINE void store(bfloat16* to, const float (&c)[D / 8][4], float upper, float lower, unsigned tile, int row, int first,
                  int length, int stride, int lane) {
  __syncwarp();
  UNROLL for (int n = 0; n < D / 8; ++n) {
    const unsigned at = place<D>(tile, row + lane / 4, n) + lane % 4 * 4;
    const unsigned below = place<D>(tile, row + lane / 4 + 8, n) + lane % 4 * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(packed(c[n][0] * upper, c[n][1] * upper)) : "memory");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(below), "r"(packed(c[n][2] * lower, c[n][3] * lower)) : "memory");
  }
  __syncwarp();
  UNROLL for (int i = 0; i < 16 * (D / 8); i += 32) {
    const int r = (i + lane) / (D / 8), piece = (i + lane) % (D / 8);
    unsigned a, b, d, e;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(d), "=r"(e) : "r"(place<D>(tile, row + r, piece)) : "memory");
    if (first + r < length)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + (long long)(first + r) * stride + piece * 8),
                   "r"(a), "r"(b), "r"(d), "r"(e) : "memory");
  }
}
"""
