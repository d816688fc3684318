"""One source for two languages: what CUDA and Metal call differently has one name in a kernel's body.

A body is written for a group of `THREADS` threads. It knows `group` and `groups` (this one's number, how many there
are), `worker` (its thread within the group), and of an input x `x_size` and `x_width`, how many numbers it has and its
last dimension. It reads and writes eight numbers at a time as fp32, and sums over 32 neighbours.

On CUDA it becomes a program of its own (`program`), compiled by `nvrtc`; where that cannot be, and on Metal, MLX makes
one of it.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.kernels.kernel_names import name_of
from mlxflow.system import terminal

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

# What a program needs of bfloat16, as `cuda_bf16.h` has it
_CUDA_TYPES = """
struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ __forceinline__ explicit bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ __forceinline__ explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
"""

_CUDA_NAMES = {
    "bool": "bool",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "float32": "float",
    "bfloat16": "bfloat16",
}

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
        threads: int = THREADS,
        resident: int = 1,
        shared_bytes: int = 0,
    ) -> list[mx.array]:
        """Return the results, lazy.

        Args:
            inputs: the arguments; made contiguous where they are not.
            constants: names of integers, truths and types that are compiled in.
            groups: of threads.
            shapes: of the results.
            dtypes: of the results.
            threads: of a group.
            resident: groups that are to fit on a processor of the device at once; what it leaves of registers is used.
            shared_bytes: of memory that a group's threads share beyond what the body declares; CUDA only.
        """
        made = [("THREADS", threads), *constants]
        types = tuple(name_of(one.dtype) for one in inputs), tuple(name_of(one) for one in dtypes)
        words = cast("str", language())
        built = None
        if words == "cuda" and (self is _TRIAL or _programs_run()):
            told = tuple((name, _shown(value)) for name, value in made)
            built = _nothing(shared_bytes) if _DOES_NOTHING.get() else _built(self, *types, told, resident)
        call = _compiled(self, words, *types, shared_bytes) if built is None else mx.fast.precompiled_cuda_kernel
        return call(
            inputs=list(inputs),
            grid=(groups * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            **({"template": made} if built is None else built.call(inputs, shared_bytes)),
        )


_DOES_NOTHING: ContextVar[bool] = ContextVar("does_nothing", default=False)


@contextmanager
def doing_nothing() -> Iterator[None]:
    """Let a program that leaves its results as the memory was stand in for each kernel that is launched in this block.

    So what is around kernels can be computed, and compiled by MLX, before they are proved.

    Raises:
        RuntimeError: a device does not run programs of our own.
    """
    words = language()
    if words is not None and not (words == "cuda" and _programs_run()):
        raise RuntimeError("this device runs no programs of our own")
    before = _DOES_NOTHING.set(True)
    try:
        yield
    finally:
        _DOES_NOTHING.reset(before)


def _nothing(shared_bytes: int) -> "Built":
    """Return a program that does nothing; MLX settles once for each how much memory its threads share.

    Raises:
        RuntimeError: it does not compile.
    """
    from mlxflow.kernels import nvrtc

    symbol = f"mlxflow_nothing_{shared_bytes}"
    code = nvrtc.compiled(f'extern "C" __global__ void {symbol}() {{}}\n')
    if code is None:
        raise RuntimeError("a program that does nothing does not compile")
    return Built(symbol, code)


#: Adds one to every number.
_TRIAL = Source(
    "trial", ("x",), ("y",), "const int at = group * THREADS + worker;\nif (at < x_size) y[at] = x[at] + 1;\n"
)


def build_trial() -> "Built | None":
    """Return the program on which it is tried whether programs run; None where MLX is to make one."""
    if language() != "cuda":
        return None
    return _built(_TRIAL, ("float32",), ("float32",), (("THREADS", str(THREADS)),), 1)


@functools.cache
def _programs_run() -> bool:
    """Return whether a program of our own runs on this device: tried on the simplest; what MLX offers may change.

    That it does is kept in the user's cache: the next process launches none to see it.
    """
    from mlxflow.kernels import cache
    from mlxflow.kernels.registry import environment

    built = build_trial()
    if built is None:
        return False
    driver = _driver()
    key = cache.key_of("programs run", environment(), driver, hashlib.sha256(built.code).hexdigest())
    if driver and cache.read().get(key) is True:
        return True
    x = mx.arange(5, dtype=mx.float32)
    try:
        (found,) = _TRIAL.launch([x], constants=[], groups=1, shapes=[(5,)], dtypes=[mx.float32])
        runs = bool(found.tolist() == [1, 2, 3, 4, 5])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        terminal.say(f"mlxflow: kernels are compiled by MLX, anew in each process: own programs fail ({said})")
        return False
    if runs and driver:
        cache.keep({key: True})
    return runs


def _driver() -> str:
    """Return what the system tells of NVIDIA's driver; nothing where it does not."""
    try:
        return Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""


class Built(NamedTuple):
    """A compiled program.

    Attributes:
        symbol: the kernel's name in it.
        code: the device's.
    """

    symbol: str
    code: bytes

    def call(self, inputs: Sequence[mx.array], shared_bytes: int) -> dict[str, Any]:
        """Return what MLX is told of the program beside what it is told of any kernel."""
        return {
            "name": self.symbol,
            "compiled_source": self.code,
            "scalars": [size for array in inputs for size in (array.size, array.shape[-1])],
            "ensure_row_contiguous": True,
            "shared_memory": shared_bytes,
        }


def program(
    source: Source,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[tuple[str, str]],
    resident: int = 1,
) -> tuple[str, str]:
    """Return a kernel's name and the CUDA program that has it, which includes nothing.

    Its arguments are the inputs, the outputs, and of each input how many numbers it has and its last dimension.

    Args:
        source: the kernel.
        inputs: names of their types.
        outputs: names of their types.
        constants: names and values, as a program has them; THREADS among them.
        resident: see `Source.launch`.

    Raises:
        KeyError: a type has no name here.
    """
    arguments = [f"const {_CUDA_NAMES[one]}* {name}" for name, one in zip(source.inputs, inputs, strict=True)]
    arguments += [f"{_CUDA_NAMES[one]}* {name}" for name, one in zip(source.outputs, outputs, strict=True)]
    arguments += [f"int {name}_{what}" for name in source.inputs for what in ("size", "width")]
    known = "".join(
        f"using {name} = {value};\n" if value in _CUDA_NAMES.values() else f"constexpr int {name} = {value};\n"
        for name, value in constants
    )
    body = f"({', '.join(arguments)}) {{\n{known}{_PLACE['cuda']}{source.body}}}\n"
    before = _CUDA_TYPES + _CUDA + source.header
    bounds = f"__launch_bounds__({dict(constants)['THREADS']}, {resident})"
    symbol = f"mlxflow_{source.name}_{hashlib.sha256((before + bounds + body).encode()).hexdigest()[:16]}"
    return symbol, f'{before}extern "C" __global__ void {bounds} {symbol}{body}'


def _shown(value: Any) -> str:
    return _CUDA_NAMES.get(name_of(value), "") if isinstance(value, mx.Dtype) else str(int(value))


@functools.cache
def _built(
    source: Source,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: tuple[tuple[str, str], ...],
    resident: int,
) -> Built | None:
    """Return the compiled program; None where MLX is to make one: for want of a compiler or for a type."""
    from mlxflow.kernels import nvrtc

    if not {*inputs, *outputs} <= _CUDA_NAMES.keys() or not all(value for _, value in constants):
        return None
    symbol, text = program(source, inputs, outputs, constants, resident)
    code = nvrtc.compiled(text)
    return None if code is None else Built(symbol, code)


def _sizes(source: Source) -> str:
    """Return what tells a kernel that MLX makes of `x_size` and `x_width`, where it asks for them."""
    told = ""
    for name in source.inputs:
        if f"{name}_size" in source.body:
            told += f"int {name}_size = 1;\nfor (int i = 0; i < {name}_ndim; ++i) {name}_size *= {name}_shape[i];\n"
        if f"{name}_width" in source.body:
            told += f"const int {name}_width = {name}_shape[{name}_ndim - 1];\n"
    return told


@functools.cache
def _compiled(
    source: Source, words: str, inputs: tuple[str, ...], outputs: tuple[str, ...], shared_bytes: int
) -> Callable[..., list[mx.array]]:
    # MLX up to 0.32.1 knows a kernel by its name alone: one for other types must have another
    make = mx.fast.cuda_kernel if words == "cuda" else mx.fast.metal_kernel
    told: dict[str, Any] = {"shared_memory": shared_bytes} if shared_bytes else {}
    made = make(
        name="_".join(["mlxflow", source.name, *inputs, *outputs]),
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=_PLACE[words] + _sizes(source) + source.body,
        header=(_CUDA if words == "cuda" else _METAL) + source.header,
        **told,
    )
    return cast("Callable[..., list[mx.array]]", made)


def groups_for(size: int) -> int:
    """Return how many groups it takes for so many numbers, eight a thread."""
    return -(-size // (8 * THREADS))
