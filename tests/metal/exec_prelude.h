// Metal's vocabulary in C++17, for a kernel that runs on the CPU. Put before the source that MLX built.
#include "types_prelude.h"
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef _Float16 half;
typedef _Float16 float16_t;
typedef __bf16 bfloat;
typedef __bf16 bfloat16_t;
typedef bfloat bfloat4 __attribute__((ext_vector_type(4)));
typedef bfloat packed_bfloat4 __attribute__((ext_vector_type(4), aligned(2)));

// Device and thread memory are plain memory here, in which clang checks alignment; check_prelude.h tells them apart
#define device
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3), section("metal_threadgroup")))
#define thread

// Where a thread stands; filled by the runner.
struct Position {
  uint group, groups, thread_, threads;
};

// Of the runner. The line is the caller's; the compiler may not duplicate a call or make it conditional.
enum Operation { SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE, SUM, MAX };
extern "C" float metal_simd(int operation, float value, int argument, int line) __attribute__((convergent));
extern "C" void metal_barrier(int flags, int line, bool is_group) __attribute__((convergent));
extern "C" float expf(float);
extern "C" float tanhf(float);
extern "C" float sqrtf(float);

// Where the variables of threadgroup memory begin and end; null if there are none.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_metal_threadgroup[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_metal_threadgroup[];
extern "C" char* metal_threadgroup_begin() { return __start_metal_threadgroup; }
extern "C" char* metal_threadgroup_end() { return __stop_metal_threadgroup; }

namespace metal {
enum class mem_flags { mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) { metal_barrier(int(flags), line, true); }
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) { metal_barrier(int(flags), line, false); }
inline float simd_shuffle_xor(float x, ushort mask, int line = __builtin_LINE()) {
  return metal_simd(SHUFFLE_XOR, x, mask, line);
}
inline float simd_shuffle_down(float x, ushort delta, int line = __builtin_LINE()) {
  return metal_simd(SHUFFLE_DOWN, x, delta, line);
}
inline float simd_shuffle(float x, ushort lane, int line = __builtin_LINE()) { return metal_simd(SHUFFLE, x, lane, line); }
inline float simd_sum(float x, int line = __builtin_LINE()) { return metal_simd(SUM, x, 0, line); }
inline float simd_max(float x, int line = __builtin_LINE()) { return metal_simd(MAX, x, 0, line); }
namespace precise {
inline float exp(float x) { return expf(x); }
inline float tanh(float x) { return tanhf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
}  // namespace precise
using namespace precise;
}  // namespace metal
using namespace metal;  // as MLX's own header has it
