"""The source text that gives CUDA and Metal one vocabulary for kernel bodies: macros, vector access, sums, types."""

#: Definitions for CUDA. Eight numbers are one or two accesses of 16 bytes where the address is aligned; a view may
#: begin anywhere.
CUDA = """
#define GLOBAL
#define LOCAL
#define SHARED __shared__
#define INLINE __device__ __forceinline__
#define BARRIER __syncthreads()
#define EXP(x) expf(x)
#define TANH(x) tanhf(x)
#define SQRT(x) sqrtf(x)
#define RSQRT(x) rsqrtf(x)
template <typename T> struct alignas(16) Eight { T values[8]; };
INLINE float sum_32(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
template <typename T> INLINE void read_8(const T* from, float (&to)[8]) {
  Eight<T> eight;
  if (reinterpret_cast<unsigned long long>(from) % 16 == 0) eight = *reinterpret_cast<const Eight<T>*>(from);
  else for (int i = 0; i < 8; ++i) eight.values[i] = from[i];
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(eight.values[i]);
}
template <typename T> INLINE void write_8(T* to, const float (&from)[8]) {
  Eight<T> eight;
  for (int i = 0; i < 8; ++i) eight.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Eight<T>*>(to) = eight;
}
"""

#: The same definitions for Metal. MLX passes an input of fewer than 8 numbers in constant memory, another in device
#: memory: what reads an input takes both. In device memory eight numbers are two accesses of four, which may begin at
#: any number: a view does.
METAL = """
#define GLOBAL device
#define LOCAL thread
#define SHARED threadgroup
#define INLINE inline
#define BARRIER metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define EXP(x) metal::precise::exp(x)
#define TANH(x) metal::precise::tanh(x)
#define SQRT(x) metal::precise::sqrt(x)
#define RSQRT(x) metal::precise::rsqrt(x)
INLINE float sum_32(float x) {
  for (ushort step = 16; step > 0; step >>= 1) x += metal::simd_shuffle_xor(x, step);
  return x;
}
template <typename T> struct Four;
template <> struct Four<float> { typedef packed_float4 type; };
template <> struct Four<bfloat16_t> { typedef packed_bfloat4 type; };
template <typename T> INLINE void read_8(const device T* from, thread float (&to)[8]) {
  typedef typename Four<T>::type Vector;
  const Vector low = *reinterpret_cast<const device Vector*>(from);
  const Vector high = *reinterpret_cast<const device Vector*>(from + 4);
  for (int i = 0; i < 4; ++i) {
    to[i] = static_cast<float>(low[i]);
    to[i + 4] = static_cast<float>(high[i]);
  }
}
template <typename T> INLINE void read_8(const constant T* from, thread float (&to)[8]) {
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(from[i]);
}
template <typename T> INLINE void write_8(device T* to, thread const float (&from)[8]) {
  typedef typename Four<T>::type Vector;
  Vector low, high;
  for (int i = 0; i < 4; ++i) {
    low[i] = static_cast<T>(from[i]);
    high[i] = static_cast<T>(from[i + 4]);
  }
  *reinterpret_cast<device Vector*>(to) = low;
  *reinterpret_cast<device Vector*>(to + 4) = high;
}
"""

#: The part of `cuda_bf16.h` that a program needs.
CUDA_TYPES = """
struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ __forceinline__ explicit bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ __forceinline__ explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
"""

#: The types of arrays in CUDA, by MLX's names.
CUDA_NAMES = {
    "bool": "bool",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "float32": "float",
    "bfloat16": "bfloat16",
}

#: Declares `group`, `groups` and `worker`, by language.
THREAD_POSITION = {
    "cuda": "const int group = blockIdx.x, groups = gridDim.x, worker = threadIdx.x;\n",
    "metal": (
        "const int group = threadgroup_position_in_grid.x, groups = threadgroups_per_grid.x, "
        "worker = thread_position_in_threadgroup.x;\n"
    ),
}
