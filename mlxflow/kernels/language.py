"""One source for two languages: what CUDA and Metal call differently has one name in a kernel's body.

A body is written for a group of `THREADS` threads. It knows `group` and `groups` (this one's number, how many there
are), `worker` (its thread within the group), reads and writes eight numbers at a time
as fp32, and sums over 32 neighbours.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

#: Threads in a group, in every kernel.
THREADS = 256

# Eight numbers are one or two accesses of 16 bytes where the address allows it; a view may begin anywhere.
_CUDA = """
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

_METAL = """
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
template <typename T> INLINE void read_8(const device T* from, thread float (&to)[8]) {
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(from[i]);
}
template <typename T> INLINE void write_8(device T* to, thread const float (&from)[8]) {
  for (int i = 0; i < 8; ++i) to[i] = static_cast<T>(from[i]);
}
"""

_PLACE = {
    "cuda": "const int group = blockIdx.x, groups = gridDim.x, worker = threadIdx.x;\n",
    "metal": (
        "const int group = threadgroup_position_in_grid.x, groups = threadgroups_per_grid.x, "
        "worker = thread_position_in_threadgroup.x;\n"
    ),
}


def language() -> str | None:
    """Return what kernels are written in for the default device: "cuda" or "metal"; None where it takes none."""
    if mx.default_device() == mx.cpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if hasattr(mx, "cuda") and mx.cuda.is_available() else None


class Source(NamedTuple):
    """A kernel for any device.

    Attributes:
        name: of the kernel.
        inputs: names of its arguments; 0-dimensional arrays are not among them.
        outputs: names of its results.
        body: what a group does, in the words of this module.
        header: functions that it uses.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    header: str = ""

    def launch(
        self,
        inputs: Sequence[mx.array],
        *,
        constants: Sequence[tuple[str, Any]],
        groups: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Return the results, lazy.

        Args:
            inputs: the arguments; made contiguous where they are not.
            constants: names of integers, truths and types that are compiled in.
            groups: of threads.
            shapes: of the results.
            dtypes: of the results.
        """
        kernel = _compiled(self, cast("str", language()))
        return kernel(
            inputs=list(inputs),
            template=[("THREADS", THREADS), *constants],
            grid=(groups * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )


@functools.cache
def _compiled(source: Source, words: str) -> Callable[..., list[mx.array]]:
    make = mx.fast.cuda_kernel if words == "cuda" else mx.fast.metal_kernel
    made = make(
        name=f"mlxflow_{source.name}",
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=_PLACE[words] + source.body,
        header=(_CUDA if words == "cuda" else _METAL) + source.header,
    )
    return cast("Callable[..., list[mx.array]]", made)


def groups_for(size: int) -> int:
    """Return how many groups it takes for so many numbers, eight a thread."""
    return -(-size // (8 * THREADS))
