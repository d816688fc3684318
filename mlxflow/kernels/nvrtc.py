"""Compiles CUDA programs with NVRTC and caches the machine code in the user's cache folder.

MLX puts its headers and CUDA's before a custom kernel and caches no compiled one, so that every process would compile
every kernel. With such headers one takes about 1.1 s of one core, without them 0.05 to 0.16 s
(`benchmarks/kernels.py compile`). NVRTC compiles one program at a time in a process, so several at once take processes.

    python -m mlxflow.kernels.nvrtc ARCHITECTURE LIBRARY   compiles the programs in its input, a JSON list, with the
                                                           NVRTC at this path; imports no mlx
"""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from mlxflow.device import child_processes
from mlxflow.storage import cache_files
from mlxflow.storage.locks import device_lock

_VERSIONS = ("13", "12")

# Seconds that compilation beside other work may take; each program takes about a second of one core
_MOST_SECONDS = 300.0

_GATHERED: ContextVar[list[str] | None] = ContextVar("gathered", default=None)


def compiled(text: str) -> bytes | None:
    """Return the machine code of a program, from the cache if possible; None without NVRTC or if it fails.

    Args:
        text: the program.
    """
    gathered = _GATHERED.get()
    if gathered is not None:
        gathered.append(text)
        return b""
    library = find_library()
    if library is None:
        return None
    return _load_or_compile(library, text, _architecture())


def _load_or_compile(library: Any, text: str, architecture: str) -> bytes | None:
    path = _cache_path(library, text, architecture)
    code = cache_files.read_payload(path)
    if code is not None:
        return code
    code = compile_for(library, text, architecture)
    if code is not None:
        cache_files.write_payload(path, code)
    return code


def _cache_path(library: Any, text: str, architecture: str) -> Path:
    digest = hashlib.sha256(f"{library_version(library)} {architecture} {text}".encode()).hexdigest()[:32]
    return device_lock().with_name("kernels") / f"{digest}.cubin"


@contextmanager
def gathering() -> Iterator[list[str]]:
    """Collect the programs that would be compiled in this block into a list; `compiled` returns no code meanwhile."""
    gathered: list[str] = []
    before = _GATHERED.set(gathered)
    try:
        yield gathered
    finally:
        _GATHERED.reset(before)


@contextmanager
def compiling_at_once(texts: Iterable[str]) -> Iterator[None]:
    """Compile programs into the cache while the block runs, in one process a CPU core.

    A program that does not compile is reported when it is used. Processes that take more than five minutes are ended.

    Args:
        texts: the programs.
    """
    library = find_library()
    missing = []
    if library is not None:
        architecture = _architecture()
        missing = [
            text
            for text in dict.fromkeys(texts)
            if cache_files.read_payload(_cache_path(library, text, architecture)) is None
        ]
    workers = min(len(missing), os.cpu_count() or 1)
    started = []
    if workers > 1:  # one alone is compiled by this process when it is used
        command = [sys.executable, "-m", __spec__.name, architecture, _file(library)]
        quiet = subprocess.DEVNULL
        for number in range(workers):
            process = child_processes.start(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, text=True)
            started.append(process)
            with suppress(BrokenPipeError), cast("IO[str]", process.stdin) as stdin:
                stdin.write(json.dumps(missing[number::workers]))
    try:
        yield
    finally:
        _wait(started)


def _wait(processes: Sequence["subprocess.Popen[str]"]) -> None:
    """Wait for processes that compile; end those that hang: what they leave is compiled when it is used."""
    end = time.monotonic() + _MOST_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _architecture() -> str:
    import mlx.core as mx

    info = mx.device_info()
    return f"sm_{info['compute_capability_major']}{info['compute_capability_minor']}"


@functools.cache
def find_library() -> Any:
    """Return NVRTC, as MLX's backend has loaded it or from one of NVIDIA's packages; None without it."""
    names = [f"libnvrtc.so.{version}" for version in _VERSIONS]
    spec = find_spec("nvidia") if sys.platform == "linux" else None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    paths = [path for folder in folders for name in names for path in sorted(folder.glob(f"*/lib/{name}"))]
    for name in [*names, *map(str, paths)]:
        try:
            return _open(name)
        except OSError:
            continue
    return None


def _open(name: str) -> Any:
    """Return a library by its name or path.

    Raises:
        OSError: there is none.
    """
    for part in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
        ctypes.CDLL(str(part))  # NVRTC loads it by name alone
    return ctypes.CDLL(name)


class _DlInfo(ctypes.Structure):
    """The C library's `Dl_info`."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file(library: Any) -> str:
    """Return the path that a library was loaded from: of two with one name, MLX may have loaded either."""
    place = _DlInfo()
    is_found = ctypes.CDLL(None).dladdr(ctypes.cast(library.nvrtcVersion, ctypes.c_void_p), ctypes.byref(place))
    return os.fsdecode(place.file) if is_found and place.file else str(library._name)


def library_version(library: Any) -> str:
    """Return NVRTC's version, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_for(library: Any, text: str, architecture: str, includes: Sequence[Path] = ()) -> bytes | None:
    """Return a program's code for an architecture; None if it does not compile.

    Args:
        library: NVRTC.
        text: the program.
        architecture: such as "sm_90".
        includes: folders of headers.
    """
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"mlxflow.cu", 0, None, None):
        return None
    try:
        options = [f"--gpu-architecture={architecture}", *(f"--include-path={folder}" for folder in includes)]
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        size = ctypes.c_size_t()
        if library.nvrtcCompileProgram(program, len(options), arguments) or library.nvrtcGetCUBINSize(
            program, ctypes.byref(size)
        ):
            return None
        code = ctypes.create_string_buffer(size.value)
        return None if library.nvrtcGetCUBIN(program, code) else code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def main(arguments: Sequence[str]) -> None:
    """Compile the programs in the input for an architecture with a library, into the cache."""
    child_processes.end_with_parent()
    architecture, path = arguments
    library = _open(path)
    for text in json.load(sys.stdin):
        _load_or_compile(library, text, architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
