"""Makes MLX's CPU backend as fast as the machine allows: a fast BLAS, and no denormal numbers.

MLX's Linux wheel brings the reference BLAS, which does about 4 GFLOP/s. A BLAS that is loaded with its symbols made
global before MLX is first imported answers MLX's calls instead. macOS has Accelerate built in and needs nothing.

Gradients of a trained attention hold numbers under 1e-38. An x86 processor takes a hundred times as long over such
denormals unless told to treat them as zero, as GPUs do; a step then takes 1.6 times as long after a few dozen updates
(`benchmarks/cpu.py`). The setting belongs to a thread and is inherited by the threads it starts.

`mx.compile` has g++ make each kernel, which takes 1.2 s, of which 0.8 s go into reading one header of MLX. So it is
read once and kept beside the kernels, in a folder that `own_folders` has checked.
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

from mlxflow.errors import WorkflowError
from mlxflow.storage.user_folders import prepare_compiled_folder

#: The command that mends what `missing` finds, on Debian and Ubuntu.
INSTALL = "sudo apt-get install -y libopenblas0-pthread g++"

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")

# Where glibc's fenv_t keeps the control word, in 32-bit words, and the bits that turn denormals off, both ways:
# x86-64 has MXCSR with flush-to-zero and denormals-are-zero, 64-bit ARM has FPCR with FZ.
_CONTROL_WORDS = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}


# glibc's M_MMAP_THRESHOLD, at its largest, and M_TRIM_THRESHOLD
_MALLOC = {-3: 1 << 25, -1: 1 << 30}


@functools.cache
def prepare() -> str | None:
    """Load a fast BLAS and start MLX's CPU threads without denormals, once a process.

    Has no effect on an MLX that is already imported, but that it compiles in a folder of the user's own from now on.

    Returns:
        the file name of the BLAS; None where none is found or none is needed.

    Raises:
        NoFolderError: there is no place where MLX may compile.
    """
    prepare_compiled_folder()
    if not sys.platform.startswith("linux"):
        return None
    with _without_denormals():
        library = _load_blas()
        _keep_freed_memory()
        import mlx.core as mx

        mx.eval(mx.add(mx.zeros(1, stream=mx.cpu), 1.0, stream=mx.cpu))  # starts the thread of the CPU's stream
    return library


def _load_blas() -> str | None:
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


#: Functions of a BLAS that set and return how many threads it computes with, by the beginning of its file's name.
_THREAD_FUNCTIONS = {
    "libopenblas": ("openblas_set_num_threads", "openblas_get_num_threads"),
    "libmkl": ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),
}

# Where macOS's Accelerate reads, when it is loaded, how many threads it may use
_ACCELERATE_THREADS = "VECLIB_MAXIMUM_THREADS"


def thread_count() -> int:
    """Return how many threads multiply matrices on the CPU, on which the last bits of a product depend.

    That is as many as there are processors, unless `fix_threads` or the BLAS's own variable says otherwise. Imports no
    mlx.
    """
    if sys.platform == "darwin":
        return int(os.environ.get(_ACCELERATE_THREADS) or os.cpu_count() or 1)
    name = _load_blas()
    return int(getattr(ctypes.CDLL(name), _thread_functions(name)[1])()) if name else 1


def fix_threads(threads: int) -> None:
    """Let that many threads multiply matrices on the CPU, however many processors there are.

    To be called before MLX is imported. MLX's own operations, and a BLAS that is built into it, take one thread each.

    Raises:
        WorkflowError: the BLAS cannot have so many.
    """
    if sys.platform == "darwin":
        os.environ[_ACCELERATE_THREADS] = str(threads)
    if not (name := _load_blas()):
        return
    library = ctypes.CDLL(name)
    if name.startswith("libmkl"):
        library.MKL_Set_Dynamic(0)  # else it takes fewer as it likes
    getattr(library, _thread_functions(name)[0])(threads)
    if (most := thread_count()) != threads:
        raise WorkflowError(
            f"workflow.threads = {threads}: {name} computes with {most} at most. Use workflow.threads = {most}."
        )


def _thread_functions(library: str) -> tuple[str, str]:
    return next(names for beginning, names in _THREAD_FUNCTIONS.items() if library.startswith(beginning))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next.

    It maps each large array anew otherwise, and the kernel fills it with zeros page by page, a tenth of a step's time
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


# What every kernel of MLX's CPU backend includes, and the options that it is compiled with: g++ takes a header that was
# read with others for none, and reads it anew
_HEADER = "mlx/backend/cpu/compiled_preamble.h"
_OPTIONS = ("-std=c++17", "-O3", "-Wall", "-fPIC")

# What must be free for the precompiled header, which takes half of it
_HEADER_BYTES = 128 * 2**20


def prepare_compiler() -> None:
    """Have g++ read MLX's header once, for all kernels to come; takes 3 s, and nothing when that was done before.

    What is included is looked for beside the kernel's source first, and there first of all as a precompiled header.

    Raises:
        NoFolderError: there is no place where MLX may compile.
    """
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        return
    import mlx.core as mx

    source = Path(mx.__file__).parent / "include"
    folder = prepare_compiled_folder()
    path = folder / "mlx" / version("mlx") / "cpu" / f"{_HEADER}.gch"
    if path.exists() or not (source / _HEADER).exists() or shutil.disk_usage(folder).free < _HEADER_BYTES:
        return
    with suppress(OSError, subprocess.CalledProcessError):  # kernels are made without it, too
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
    told = ["-I", str(source), "-x", "c++-header", str(source / _HEADER), "-o", str(private)]
    subprocess.run(["g++", *_OPTIONS, *told], check=True, capture_output=True)
    private.replace(path)


def missing() -> list[str]:
    """Return what makes MLX's CPU backend slow here: `OpenBLAS` and `g++`, where they are needed and not there."""
    if not sys.platform.startswith("linux"):
        return []
    lacking = [] if prepare() else ["OpenBLAS (matrix products run about 15 times slower without it)"]
    if not shutil.which("g++"):
        lacking.append("g++ (mx.compile silently runs uncompiled without it)")
    return lacking


def notice() -> str | None:
    """Return one line for the terminal where something is missing, with the command that installs it."""
    lacking = missing()
    return f"mlxflow: the CPU backend lacks {' and '.join(lacking)}. Run: {INSTALL}" if lacking else None
