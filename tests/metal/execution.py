"""Executes captured Metal kernels on the CPU: compiled by clang, run by `runner.cpp` in a process of its own."""

import atexit
import functools
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tests.metal import clang
from tests.metal.capture import MetalSource, Parameter

_FOLDER = Path(__file__).parent
#: Orders in which threads run: forward, reverse, shuffled. All must give the same bits.
ALL_ORDERS = 0b111
FORWARD, REVERSE, SHUFFLED = 1, 2, 4

_SECONDS = 60

_FLAGS = (
    "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-w",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,bounds,alignment,shift,bool", "-fsanitize-trap=all",
)  # fmt: skip

#: A thread's position, by the attributes of parameters.
_POSITIONS = {
    "thread_position_in_grid": "uint3{p->group * THREADS_ + p->thread_, 0, 0}",
    "thread_position_in_threadgroup": "uint3{p->thread_, 0, 0}",
    "threadgroup_position_in_grid": "uint3{p->group, 0, 0}",
    "threadgroups_per_grid": "uint3{p->groups, 1, 1}",
    "threads_per_threadgroup": "uint3{p->threads, 1, 1}",
    "thread_index_in_threadgroup": "p->thread_",
    "thread_index_in_simdgroup": "p->thread_ % 32",
    "simdgroup_index_in_threadgroup": "p->thread_ / 32",
    "threads_per_simdgroup": "32",
}


class KernelFaultError(Exception):
    """A kernel did what it must not do: the message says what and where."""


class Output(NamedTuple):
    """An output of a kernel.

    Attributes:
        size: number of its elements.
        item_bytes: of an element.
    """

    size: int
    item_bytes: int


_folders: list[Path] = []


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder, which several processes can share."""
    _folders[:] = [folder]


def _folder() -> Path:
    if not _folders:
        made = tempfile.TemporaryDirectory(prefix="mlxflow-metal-")
        atexit.register(made.cleanup)
        keep_programs(Path(made.name))
    return _folders[0]


def _compiled(name: str, text: str, flags: Sequence[str]) -> Path:
    """Return the program that clang makes of a text.

    Raises:
        clang.RefusedSourceError: it does not compile.
        clang.ClangCrashError: clang crashed.
    """
    key = hashlib.sha256("\0".join([text, *flags]).encode()).hexdigest()[:16]
    path = _folder() / f"{name[:60]}-{key}"
    if not path.exists():
        beside = path.with_suffix(f".{os.getpid()}")
        messages = clang.run([*flags, f"-I{_FOLDER}", "-", "-o", str(beside), "-lm"], text)
        if messages:
            raise clang.RefusedSourceError(messages)
        beside.replace(path)
    return path


def _argument(parameter: Parameter, buffer: int) -> str:
    """Return the C++ expression of an argument."""
    if parameter.attribute != "buffer":
        return _POSITIONS[parameter.attribute]
    if parameter.type.endswith("&"):
        return f"*({parameter.type[:-1]}*)b[{buffer}]"
    return f"({parameter.type})b[{buffer}]"


@functools.cache
def compiled(source: MetalSource, threads: int) -> Path:
    """Return the library of a kernel.

    Args:
        source: of the kernel.
        threads: of a group.

    Raises:
        clang.RefusedSourceError: it does not compile.
        clang.ClangCrashError: clang crashed.
    """
    arguments, buffers = [], 0
    for parameter in source.parameters:
        arguments.append(_argument(parameter, buffers))
        buffers += parameter.attribute == "buffer"
    entry = f"{source.instance}({', '.join(arguments)});".replace("THREADS_", str(threads))
    text = (
        f'#include "exec_prelude.h"\n#line 1 "kernel"\n{source.definitions}\n'
        f'extern "C" void metal_entry(void* const* b, const Position* p) {{ {entry} }}\n'
    )
    return _compiled(source.instance.partition("<")[0].removeprefix("custom_kernel_"), text, _FLAGS)


def threadgroup_bytes(source: MetalSource, threads: int) -> int:
    """Return the threadgroup memory of a kernel; arguments and errors are those of `compiled`."""
    sizes = subprocess.run(["size", "-A", compiled(source, threads)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"^metal_threadgroup\s+(\d+)", sizes, re.MULTILINE)
    return int(found[1]) if found else 0


class Runner:
    """A process that runs kernels; started when it is needed, and again after a fault has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        library: Path,
        *,
        grid: int,
        threads: int,
        buffers: Sequence[tuple[str, "np.ndarray[Any, Any] | Output"]],
        orders: int = ALL_ORDERS,
    ) -> list[bytes]:
        """Return the bytes of each output.

        Args:
            library: of the kernel.
            grid: number of all threads.
            threads: of a group.
            buffers: names, and inputs or outputs, in the order of the kernel's parameters.
            orders: in which threads run, a sum of FORWARD, REVERSE and SHUFFLED; all must give the same bits.

        Raises:
            KernelFaultError: the kernel reads or writes where it must not, or its threads do not meet.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        request = [_text(str(library)), struct.pack("<5I", grid, threads, orders, _SECONDS, len(buffers))]
        for name, buffer in buffers:
            is_output = isinstance(buffer, Output)
            item_bytes = buffer.item_bytes if isinstance(buffer, Output) else buffer.itemsize
            request += [_text(name), struct.pack("<IIQ", is_output, item_bytes, buffer.size * item_bytes)]
            if isinstance(buffer, np.ndarray):
                request.append(buffer.tobytes())
        try:
            process.stdin.write(b"".join(request))
            process.stdin.flush()
        except BrokenPipeError:  # what it answered is read below
            pass
        (status,) = struct.unpack("<I", self._read(process.stdout, 4))
        if status:
            (length,) = struct.unpack("<I", self._read(process.stdout, 4))
            message = self._read(process.stdout, length).decode()
            self.end()
            raise KernelFaultError(message)
        outputs = [buffer for _, buffer in buffers if isinstance(buffer, Output)]
        return [self._read(process.stdout, output.size * output.item_bytes) for output in outputs]

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            text = (_FOLDER / "runner.cpp").read_text(encoding="utf-8")
            program = _compiled("runner", text, ("-x", "c++", "-std=c++17", "-O2", "-rdynamic", "-lstdc++", "-ldl"))
            self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _read(self, stream: IO[bytes], count: int) -> bytes:
        found = stream.read(count)
        if len(found) < count:
            self.end()
            raise KernelFaultError("the runner of kernels ended without an answer")
        return found


@functools.cache
def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


@functools.cache
def runner() -> Runner:
    """Return this process's runner, which ends with it."""
    made = Runner()
    atexit.register(made.end)
    return made
