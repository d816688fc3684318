"""CUDA's own compiler on a kernel that includes nothing, and what came out kept in the user's cache.

MLX puts its headers and CUDA's before a kernel of ours and keeps no compiled one, so that each process would compile
each anew. Behind such headers one takes about 1.1 s of one core, alone 0.05 to 0.16 (`benchmarks/kernels.py compile`).
NVRTC compiles one program at a time, whatever the threads: several at once take processes.

    python -m mlxflow.kernels.nvrtc ARCHITECTURE LIBRARY   compiles the programs of its input, a list in JSON, by the
                                                           NVRTC at a path; imports no mlx
"""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from mlxflow.storage import artifact_files
from mlxflow.storage.locks import device_lock
from mlxflow.system import child_processes

_VERSIONS = ("13", "12")

_GATHERED: ContextVar[list[str] | None] = ContextVar("gathered", default=None)


def compiled(text: str) -> bytes | None:
    """Return the device's code of a program; None where there is no such compiler, or it does not take it.

    Args:
        text: the program.
    """
    gathered = _GATHERED.get()
    if gathered is not None:
        gathered.append(text)
        return b""
    library = _library()
    if library is None:
        return None
    return _kept_or_compiled(library, text, _architecture())


def _kept_or_compiled(library: Any, text: str, architecture: str) -> bytes | None:
    path = _path(library, text, architecture)
    kept = _read(path)
    if kept is not None:
        return kept
    code = compile_for(library, text, architecture)
    if code is not None:
        _write(path, code)
    return code


def _path(library: Any, text: str, architecture: str) -> Path:
    digest = hashlib.sha256(f"{_version(library)} {architecture} {text}".encode()).hexdigest()[:32]
    return device_lock().with_name("kernels") / f"{digest}.cubin"


@contextmanager
def gathering() -> Iterator[list[str]]:
    """Give a list that gets the programs that would be compiled in this block, where `compiled` returns no code."""
    gathered: list[str] = []
    before = _GATHERED.set(gathered)
    try:
        yield gathered
    finally:
        _GATHERED.reset(before)


@contextmanager
def compiling_at_once(texts: Iterable[str]) -> Iterator[None]:
    """Compile programs at the same time, in a process for each processor, while the block runs, and keep each.

    One that does not compile says so when it is wanted.

    Args:
        texts: the programs.
    """
    library = _library()
    missing = []
    if library is not None:
        architecture = _architecture()
        missing = [text for text in dict.fromkeys(texts) if _read(_path(library, text, architecture)) is None]
    workers = min(len(missing), os.cpu_count() or 1)
    started = []
    if workers > 1:  # else this process does
        command = [sys.executable, "-m", __spec__.name, architecture, _file(library)]
        quiet = subprocess.DEVNULL
        for number in range(workers):
            process = child_processes.start(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, text=True)
            started.append(process)
            with suppress(BrokenPipeError), cast("IO[str]", process.stdin) as given:
                given.write(json.dumps(missing[number::workers]))
    try:
        yield
    finally:
        for process in started:
            process.wait()


def _architecture() -> str:
    import mlx.core as mx

    told = mx.device_info()
    return f"sm_{told['compute_capability_major']}{told['compute_capability_minor']}"


def _read(path: Path) -> bytes | None:
    """Return what a file holds behind its digest; None where it is not there or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    with suppress(OSError):  # compiled anew next time
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact_files.write_whole(path, hashlib.sha256(code).digest() + code)


@functools.cache
def _library() -> Any:
    """Return NVRTC, which MLX's own backend has loaded, or that lies in one of NVIDIA's packages; None without."""
    names = [f"libnvrtc.so.{version}" for version in _VERSIONS]
    spec = find_spec("nvidia") if sys.platform == "linux" else None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for name in names for path in sorted(folder.glob(f"*/lib/{name}"))]
    for name in [*names, *map(str, found)]:
        try:
            return _opened(name)
        except OSError:
            continue
    return None


def _opened(name: str) -> Any:
    """Return a library by its name or path.

    Raises:
        OSError: there is none.
    """
    for part in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
        ctypes.CDLL(str(part))  # which it looks for by name alone
    return ctypes.CDLL(name)


class _Place(ctypes.Structure):
    """The C library's `Dl_info`."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file(library: Any) -> str:
    """Return where a library was loaded from: of two that have one name, MLX may have loaded either."""
    place = _Place()
    found = ctypes.CDLL(None).dladdr(ctypes.cast(library.nvrtcVersion, ctypes.c_void_p), ctypes.byref(place))
    return os.fsdecode(place.file) if found and place.file else str(library._name)


def _version(library: Any) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_for(library: Any, text: str, architecture: str, includes: Sequence[Path] = ()) -> bytes | None:
    """Return a program's code for an architecture; None where the compiler does not take it.

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
        told = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        size = ctypes.c_size_t()
        if library.nvrtcCompileProgram(program, len(options), told) or library.nvrtcGetCUBINSize(
            program, ctypes.byref(size)
        ):
            return None
        code = ctypes.create_string_buffer(size.value)
        return None if library.nvrtcGetCUBIN(program, code) else code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def main(arguments: Sequence[str]) -> None:
    """Compile the programs of the input for an architecture by a library, and keep them."""
    child_processes.end_with_parent()
    architecture, path = arguments
    library = _opened(path)
    for text in json.load(sys.stdin):
        _kept_or_compiled(library, text, architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
