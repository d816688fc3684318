// Metal's vocabulary in C++ for OpenCL, for clang's semantic check. Put before the source that MLX built.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#include "types_prelude.h"
typedef half half4 __attribute__((ext_vector_type(4)));
typedef half bfloat;  // clang's C++ for OpenCL has no bfloat
typedef half4 bfloat4;
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef half packed_bfloat4 __attribute__((ext_vector_type(4), aligned(2)));
typedef half float16_t;
typedef bfloat bfloat16_t;

#define device __global
#define constant __constant
#define threadgroup __private
#define thread __private

namespace metal {
enum class mem_flags { mem_device = 1, mem_threadgroup = 2 };
void threadgroup_barrier(mem_flags) __attribute__((convergent));
void simdgroup_barrier(mem_flags) __attribute__((convergent));
float simd_shuffle_xor(float, ushort);
float simd_shuffle_down(float, ushort);
float simd_shuffle(float, ushort);
float simd_sum(float);
float simd_max(float);
namespace precise {
float exp(float);
float tanh(float);
float sqrt(float);
float rsqrt(float);
}  // namespace precise
using namespace precise;
}  // namespace metal
using namespace metal;  // as MLX's own header has it
