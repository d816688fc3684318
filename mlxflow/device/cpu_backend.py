"""Prepare MLX's CPU backend: a fast BLAS, denormals flushed to zero, freed memory kept, a precompiled header.

MLX's Linux wheel brings the reference BLAS, which does about 4 GFLOP/s. A BLAS that is loaded with global symbols
before MLX is first imported takes its place. macOS has Accelerate built in and needs nothing.

Gradients of trained attention contain numbers below 1e-38. An x86 processor takes a hundred times as long for such
denormals unless they are flushed to zero, as GPUs do; without that a step takes 1.6 times as long after a few dozen
updates (`benchmarks/cpu.py`). The setting belongs to a thread and is inherited by the threads it starts.

`mx.compile` builds each CPU kernel with g++ in 1.2 s and spends 0.8 s of that on parsing one header of MLX. That
header is precompiled once and stored beside the kernels, in a folder that `storage.user_folders` has checked.
"""

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mlxflow.device import developer_tools, mlx_environment, openblas_core
from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.user_folders import prepare_compiled_folder

if TYPE_CHECKING:
    import mlx.core as mx

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")

# Where glibc's fenv_t keeps the control word, in 32-bit words, and the bits that turn denormals off, both ways:
# x86-64 has MXCSR with flush-to-zero and denormals-are-zero, 64-bit ARM has FPCR with FZ.
_CONTROL_WORDS = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}


# glibc's M_MMAP_THRESHOLD, at its largest, and M_TRIM_THRESHOLD
_MALLOC = {-3: 1 << 25, -1: 1 << 30}


@functools.cache
def prepare() -> str | None:
    """Load a fast BLAS and start MLX's CPU threads without denormals, once a process.

    If MLX is already imported, only the folder changes in which it compiles.

    Returns:
        the file name of the BLAS; None if none is found or none is needed.

    Raises:
        NoFolderError: no folder is safe for compiled code.
    """
    prepare_compiled_folder()
    mlx_environment.prepare()
    if not sys.platform.startswith("linux"):
        return None
    with _without_denormals():
        library = _load_blas()
        _keep_freed_memory()
        import mlx.core as mx

        mx.eval(mx.add(mx.zeros(1, stream=mx.cpu), 1.0, stream=mx.cpu))  # starts the thread of the CPU's stream
    return library


def new_stream() -> "mx.Stream":
    """Return another stream of MLX's CPU backend; like the default stream's, its thread treats denormals as zero."""
    import mlx.core as mx

    with _without_denormals():
        stream = mx.new_stream(mx.cpu)
        mx.eval(mx.add(mx.zeros(1, stream=stream), 1.0, stream=stream))  # starts its thread
        return stream


def _load_blas() -> str | None:
    for name in _LIBRARIES:
        try:
            if name.startswith("libopenblas"):
                openblas_core.load(name)
            else:
                ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def describe_blas(library: str | None) -> str:
    """Return the name of the BLAS that `prepare` returned and, of OpenBLAS, the processor type whose code it uses."""
    if library is None:
        return "built in"
    if not library.startswith("libopenblas"):
        return library
    return f"{library} ({openblas_core.core_of(ctypes.CDLL(library))})"


#: Functions of a BLAS that set and return its number of threads, by the beginning of its file's name.
_THREAD_FUNCTIONS = {
    "libopenblas": ("openblas_set_num_threads", "openblas_get_num_threads"),
    "libmkl": ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),
}

# The environment variable from which macOS's Accelerate reads its number of threads when it is loaded
_ACCELERATE_THREADS = "VECLIB_MAXIMUM_THREADS"


def thread_count() -> int:
    """Return the number of threads of the BLAS; the last bits of a matrix product depend on it. Imports no mlx.

    That is the number of processors, unless `fix_threads` or the environment variable of the BLAS set another.
    """
    if sys.platform == "darwin":
        return int(os.environ.get(_ACCELERATE_THREADS) or os.cpu_count() or 1)
    name = _load_blas()
    return int(getattr(ctypes.CDLL(name), _thread_functions(name)[1])()) if name else 1


def fix_threads(threads: int, *, key: str = "threads") -> None:
    """Set the number of threads of the BLAS, regardless of the number of processors.

    Call it before MLX is imported. MLX's own operations, and a BLAS that is built into it, use one thread each.

    Args:
        threads: of matrix products.
        key: the setting, for the message.

    Raises:
        WorkflowError: the BLAS does not support that many.
    """
    if sys.platform == "darwin":
        os.environ[_ACCELERATE_THREADS] = str(threads)
    if not (name := _load_blas()):
        return
    library = ctypes.CDLL(name)
    if name.startswith("libmkl"):
        library.MKL_Set_Dynamic(0)  # else it may use fewer
    getattr(library, _thread_functions(name)[0])(threads)
    if (most := thread_count()) != threads:
        raise WorkflowError(f"{key} = {threads}: {name} computes with {most} at most. Use {key} = {most}.")


def _thread_functions(library: str) -> tuple[str, str]:
    return next(names for beginning, names in _THREAD_FUNCTIONS.items() if library.startswith(beginning))


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations.

    Otherwise it maps each large array from the system, and the kernel zeroes it page by page: a tenth of a step's time
    (`benchmarks/train.py cpu`).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, most_bytes in _MALLOC.items():
            library.mallopt(parameter, most_bytes)


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Treat denormals as zero in this thread and the threads it starts, until the block ends."""
    word, bits = _CONTROL_WORDS.get(platform.machine(), (0, 0))
    library = ctypes.CDLL(None)
    if not bits or not hasattr(library, "fegetenv"):
        yield
        return
    before, changed = (ctypes.c_uint32 * 64)(), (ctypes.c_uint32 * 64)()
    library.fegetenv(before)
    library.fegetenv(changed)
    changed[word] |= bits
    library.fesetenv(changed)
    try:
        yield
    finally:
        library.fesetenv(before)


# The header that every kernel of MLX's CPU backend includes, and MLX's compiler options: g++ ignores a precompiled
# header that was made with other options
_HEADER = "mlx/backend/cpu/compiled_preamble.h"
_OPTIONS = ("-std=c++17", "-O3", "-Wall", "-fPIC")

# Disk space required for the precompiled header, which takes half of it
_HEADER_BYTES = 128 * 2**20


def prepare_compiler() -> None:
    """Precompile MLX's header for g++, if that was not done before; takes 3 s.

    g++ looks for an included file beside the kernel's source first, and there for a precompiled header first.

    Raises:
        NoFolderError: no folder is safe for compiled code.
    """
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        return
    import mlx.core as mx

    source = Path(mx.__file__).parent / "include"
    folder = prepare_compiled_folder()
    path = folder / "mlx" / version("mlx") / "cpu" / f"{_HEADER}.gch"
    if path.exists() or not (source / _HEADER).exists() or shutil.disk_usage(folder).free < _HEADER_BYTES:
        return
    with suppress(OSError, subprocess.CalledProcessError):  # kernels compile without it, too
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(path.parent):
            if not path.exists():
                _precompile(source, path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _precompile(source: Path, path: Path) -> None:
    private = path.with_name(f"{path.name}.partial")
    arguments = ["-I", str(source), "-x", "c++-header", str(source / _HEADER), "-o", str(private)]
    subprocess.run(["g++", *_OPTIONS, *arguments], check=True, capture_output=True)
    private.replace(path)


_UNCOMPILED = "mx.compile silently runs uncompiled without it"


def lacks_compiler() -> bool:
    """Return whether `mx.compile` runs uncompiled; imports mlx on Linux."""
    return any(lacking.startswith("g++") for lacking in missing())


def install_command() -> str:
    """Return the command that installs what `missing` returns, on macOS, Debian and Ubuntu."""
    if sys.platform == "darwin":
        return developer_tools.INSTALL
    return "sudo apt-get install -y libopenblas0-pthread g++"


def missing() -> list[str]:
    """Return which of `OpenBLAS` and `g++` MLX lacks here, each with the consequence; imports mlx on Linux."""
    if sys.platform == "darwin":
        return [] if developer_tools.find("g++") else [f"g++ ({_UNCOMPILED})"]
    if not sys.platform.startswith("linux"):
        return []
    lacking = [] if prepare() else ["OpenBLAS (matrix products run about 15 times slower without it)"]
    if not shutil.which("g++"):
        lacking.append(f"g++ ({_UNCOMPILED})")
    return lacking


def notice(device: str) -> str | None:
    """Return a line that names what is missing and the command that installs it; None if nothing is missing.

    Args:
        device: "cpu", or "gpu", for which only MLX on macOS calls a compiler.
    """
    lacking = missing() if device == "cpu" or sys.platform == "darwin" else []
    name = "MLX" if sys.platform == "darwin" else "the CPU backend"
    return f"mlxflow: {name} lacks {' and '.join(lacking)}. Run: {install_command()}" if lacking else None
