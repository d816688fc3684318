"""Load OpenBLAS with code for this processor, also where it does not know the processor.

OpenBLAS chooses its code by the processor's model number, and for one that is newer than itself takes that for SSE3: on
an Emerald Rapids Xeon, Debian 12's OpenBLAS 0.3.21 multiplies matrices at a fifth of the pace (`benchmarks/cpu.py`). It
reads the environment variable `OPENBLAS_CORETYPE` when it is loaded.
"""

import _ctypes
import ctypes
import os
from pathlib import Path

_VARIABLE = "OPENBLAS_CORETYPE"

# Names by which OpenBLAS reports code without AVX2
_OLD_CORES = frozenset(
    "Katmai Coppermine Northwood Prescott Banias Atom Core2 Penryn Dunnington Nehalem Sandybridge Athlon Opteron "
    "Opteron_SSE3 Barcelona Bobcat Generic".lower().split()
)

# Code by the processor features that it needs, the fastest first
_CORES = (("SkylakeX", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}), ("Haswell", {"avx2", "fma"}))

_FLAGS = Path("/proc/cpuinfo")


def load(name: str) -> ctypes.CDLL:
    """Load OpenBLAS with global symbols; a second time, with a named core, where it chose one without AVX2.

    The environment variable is set then, for this process and those it starts. One that the user set is kept.

    Args:
        name: of the library.

    Raises:
        OSError: it cannot be loaded.
    """
    library = ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    if _VARIABLE in os.environ or core_of(library).lower() not in _OLD_CORES:
        return library
    core = best_core()
    if core is None:
        return library
    _ctypes.dlclose(library._handle)
    os.environ[_VARIABLE] = core
    return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)


def core_of(library: ctypes.CDLL) -> str:
    """Return the name of the processor type whose code OpenBLAS uses."""
    library.openblas_get_corename.restype = ctypes.c_char_p
    return str(library.openblas_get_corename().decode())


def best_core() -> str | None:
    """Return the fastest code of OpenBLAS whose instructions this processor has; None for the oldest or no x86."""
    try:
        lines = _FLAGS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = {flag for line in lines[:64] if line.startswith("flags") for flag in line.split()}
    return next((core for core, needed in _CORES if needed <= flags), None)
