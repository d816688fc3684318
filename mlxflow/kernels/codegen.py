"""Generates and launches kernels: one body for CUDA and Metal, in the vocabulary of `language_definitions`.

A body is written for a group of `THREADS` threads. It knows `group` and `groups` (the index of this group and their
number), `worker` (the thread's index within the group), and for an input x `x_size` and `x_width`, its number of
elements and its last dimension. It reads and writes eight numbers at a time as fp32, and sums over 32 neighbours.

On CUDA it becomes a self-contained program (`program`), compiled by `nvrtc`. On Metal, and where that fails, MLX
generates and compiles the program.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.kernels import cache, nvrtc
from mlxflow.kernels.fingerprint import environment
from mlxflow.kernels.kernel_names import name_of
from mlxflow.kernels.language_definitions import CUDA, CUDA_NAMES, CUDA_TYPES, METAL, THREAD_POSITION
from mlxflow.messages import terminal
from mlxflow.messages.errors import reason_of

#: Threads in a group, in every kernel.
THREADS = 256


def language() -> str | None:
    """Return the kernel language of the default device, "cuda" or "metal"; None if it supports no kernels."""
    if mx.default_device() == mx.cpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if hasattr(mx, "cuda") and mx.cuda.is_available() else None


class KernelSource(NamedTuple):
    """A kernel for any device.

    Attributes:
        name: of the kernel.
        inputs: names of its arguments; 0-dimensional arrays are not among them.
        outputs: names of its results.
        body: the code of a group.
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
            constants: integers, booleans and dtypes that are compiled in, by name.
            groups: of threads.
            shapes: of the results.
            dtypes: of the results.
            threads: of a group.
            resident: groups that must fit on a multiprocessor at once; this limits the registers of a thread.
            shared_bytes: of memory that a group's threads share beyond what the body declares; CUDA only.
        """
        template = [("THREADS", threads), *constants]
        types = tuple(name_of(array.dtype) for array in inputs), tuple(name_of(dtype) for dtype in dtypes)
        kernel_language = cast("str", language())
        program = None
        if kernel_language == "cuda" and (self is _TRIAL or programs_run()):
            literals = tuple((name, _literal(value)) for name, value in template)
            does_nothing = _DOES_NOTHING.get()
            program = no_op_program(shared_bytes) if does_nothing else compile_program(self, *types, literals, resident)
            if program is not None and _IS_TRACED.get():
                program = program._replace(code=b"")
        if program is None:
            call = _mlx_kernel(self, kernel_language, *types, shared_bytes)
        else:
            call = mx.fast.precompiled_cuda_kernel
        return call(
            inputs=list(inputs),
            grid=(groups * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            **({"template": template} if program is None else program.arguments(inputs, shared_bytes)),
        )


_DOES_NOTHING: ContextVar[bool] = ContextVar("does_nothing", default=False)


@contextmanager
def doing_nothing() -> Iterator[None]:
    """Replace each kernel that is launched in this block by one that leaves its results uninitialized.

    So MLX can compile what surrounds the kernels before they are verified.

    Raises:
        RuntimeError: the device does not run precompiled programs.
    """
    kernel_language = language()
    if kernel_language is not None and not (kernel_language == "cuda" and programs_run()):
        raise RuntimeError("this device runs no precompiled programs")
    before = _DOES_NOTHING.set(True)
    try:
        yield
    finally:
        _DOES_NOTHING.reset(before)


_IS_TRACED: ContextVar[bool] = ContextVar("is_traced", default=False)


@contextmanager
def traceable() -> Iterator[None]:
    """Launch kernels in this block without their machine code: their results can be traced, but not evaluated.

    MLX's export of a graph takes the code of a kernel for text, and raises UnicodeDecodeError.
    """
    before = _IS_TRACED.set(True)
    try:
        yield
    finally:
        _IS_TRACED.reset(before)


def no_op_program(shared_bytes: int) -> "Program":
    """Return a program that does nothing; one for each size of shared memory, which MLX sets once for each program.

    Raises:
        RuntimeError: it does not compile.
    """
    symbol = f"mlxflow_nothing_{shared_bytes}"
    code = nvrtc.compiled(f'extern "C" __global__ void {symbol}() {{}}\n')
    if code is None:
        raise RuntimeError("a program that does nothing does not compile")
    return Program(symbol, code)


#: Adds one to every number.
_TRIAL = KernelSource(
    "trial", ("x",), ("y",), "const int at = group * THREADS + worker;\nif (at < x_size) y[at] = x[at] + 1;\n"
)


def trial_program() -> "Program | None":
    """Return the program that shows whether programs run on this device; None if it cannot be compiled."""
    if language() != "cuda":
        return None
    return compile_program(_TRIAL, ("float32",), ("float32",), (("THREADS", str(THREADS)),), 1)


@functools.cache
def programs_run() -> bool:
    """Return whether MLX runs a precompiled program on this device: the simplest one is launched.

    A success is cached in the user's cache folder, so that later processes launch none.
    """
    trial = trial_program()
    if trial is None:
        return False
    driver = _driver()
    key = cache.key_of("programs run", environment(), driver, hashlib.sha256(trial.code).hexdigest())
    if driver and cache.read_layers().get(key) is True:
        return True
    x = mx.arange(5, dtype=mx.float32)
    try:
        (y,) = _TRIAL.launch([x], constants=[], groups=1, shapes=[(5,)], dtypes=[mx.float32])
        runs = bool(y.tolist() == [1, 2, 3, 4, 5])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = reason_of(error)
        terminal.say(
            f"mlxflow: precompiled kernels cannot be loaded ({reason}); MLX will compile them in every process"
        )
        return False
    if runs and driver:
        cache.add_layers({key: True})
    return runs


def _driver() -> str:
    """Return the version text of NVIDIA's driver; empty if the system has none."""
    try:
        return Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        symbol: the kernel's name in it.
        code: the machine code.
    """

    symbol: str
    code: bytes

    def arguments(self, inputs: Sequence[mx.array], shared_bytes: int) -> dict[str, Any]:
        """Return the arguments of MLX's call that only a precompiled program takes."""
        return {
            "name": self.symbol,
            "compiled_source": self.code,
            "scalars": [size for array in inputs for size in (array.size, array.shape[-1])],
            "ensure_row_contiguous": True,
            "shared_memory": shared_bytes,
        }


def program_text(
    source: KernelSource,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[tuple[str, str]],
    resident: int = 1,
) -> tuple[str, str]:
    """Return a kernel's symbol and its self-contained CUDA program, which includes no headers.

    Its arguments are the inputs, the outputs, and for each input its number of elements and its last dimension.

    Args:
        source: the kernel.
        inputs: names of their types.
        outputs: names of their types.
        constants: names and literals; THREADS among them.
        resident: see `KernelSource.launch`.

    Raises:
        KeyError: a type has no name in CUDA.
    """
    arguments = [f"const {CUDA_NAMES[dtype]}* {name}" for name, dtype in zip(source.inputs, inputs, strict=True)]
    arguments += [f"{CUDA_NAMES[dtype]}* {name}" for name, dtype in zip(source.outputs, outputs, strict=True)]
    arguments += [f"int {name}_{part}" for name in source.inputs for part in ("size", "width")]
    known = "".join(
        f"using {name} = {value};\n" if value in CUDA_NAMES.values() else f"constexpr int {name} = {value};\n"
        for name, value in constants
    )
    body = f"({', '.join(arguments)}) {{\n{known}{THREAD_POSITION['cuda']}{source.body}}}\n"
    before = CUDA_TYPES + CUDA + source.header
    bounds = f"__launch_bounds__({dict(constants)['THREADS']}, {resident})"
    symbol = f"mlxflow_{source.name}_{hashlib.sha256((before + bounds + body).encode()).hexdigest()[:16]}"
    return symbol, f'{before}extern "C" __global__ void {bounds} {symbol}{body}'


def _literal(value: Any) -> str:
    return CUDA_NAMES.get(name_of(value), "") if isinstance(value, mx.Dtype) else str(int(value))


@functools.cache
def compile_program(
    source: KernelSource,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    constants: tuple[tuple[str, str], ...],
    resident: int,
) -> Program | None:
    """Return the compiled program; None without a compiler or for a type without a name in CUDA.

    Args:
        source: the kernel.
        inputs: names of their types.
        outputs: names of their types.
        constants: see `program_text`.
        resident: see `KernelSource.launch`.
    """
    if not {*inputs, *outputs} <= CUDA_NAMES.keys() or not all(value for _, value in constants):
        return None
    symbol, text = program_text(source, inputs, outputs, constants, resident)
    code = nvrtc.compiled(text)
    return None if code is None else Program(symbol, code)


def _sizes(source: KernelSource) -> str:
    """Return the declarations of `x_size` and `x_width` for a kernel that MLX generates, where its body uses them."""
    text = ""
    for name in source.inputs:
        if f"{name}_size" in source.body:
            text += f"int {name}_size = 1;\nfor (int i = 0; i < {name}_ndim; ++i) {name}_size *= {name}_shape[i];\n"
        if f"{name}_width" in source.body:
            text += f"const int {name}_width = {name}_shape[{name}_ndim - 1];\n"
    return text


@functools.cache
def _mlx_kernel(
    source: KernelSource, kernel_language: str, inputs: tuple[str, ...], outputs: tuple[str, ...], shared_bytes: int
) -> Callable[..., list[mx.array]]:
    # MLX up to 0.32.1 caches a kernel by its name alone: each combination of types needs its own
    make = mx.fast.cuda_kernel if kernel_language == "cuda" else mx.fast.metal_kernel
    options: dict[str, Any] = {"shared_memory": shared_bytes} if shared_bytes else {}
    kernel = make(
        name="_".join(["mlxflow", source.name, *inputs, *outputs]),
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=THREAD_POSITION[kernel_language] + _sizes(source) + source.body,
        header=(CUDA if kernel_language == "cuda" else METAL) + source.header,
        **options,
    )
    return cast("Callable[..., list[mx.array]]", kernel)


def groups_for(size: int) -> int:
    """Return the number of groups for a number of elements, eight a thread."""
    return -(-size // (8 * THREADS))
