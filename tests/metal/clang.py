"""The semantic check of Metal sources by clang, in C++ for OpenCL, and what it accepts although Metal does not."""

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.metal.capture import MetalSource

_FOLDER = Path(__file__).parent
_OLDEST = 19
_NEWEST = 29

#: Buffers that a kernel of Metal can have.
MOST_BUFFERS = 31

_CHECK = (
    "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-cl-no-stdinc", "-nogpulib",
    # No generic address space, no double, no variables of a program but constants
    "-Xclang", "-cl-ext=-all,+cl_khr_fp16",
    "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-attributes", "-Wno-unused-variable",
    "-include", str(_FOLDER / "check_prelude.h"),
)  # fmt: skip


class RefusedSourceError(Exception):
    """Metal's compiler would not take a source."""


class ClangCrashError(Exception):
    """Clang itself failed: nothing is known about the source."""


@functools.cache
def missing() -> str:
    """Return why there is no stand-in on this machine; empty if there is one."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the stand-in for Metal runs on Linux x86_64, not on {platform.system()} {platform.machine()}"
    if compiler() is None:
        return f"the stand-in for Metal needs clang {_OLDEST} or newer: apt-get install clang-{_OLDEST}"
    return ""


@functools.cache
def compiler() -> str | None:
    """Return the path of clang 19 or newer; None if there is none."""
    for name in ("clang", *(f"clang-{version}" for version in range(_OLDEST, _NEWEST))):
        path = shutil.which(name)
        if path is not None and _version(path) >= _OLDEST:
            return path
    return None


def _version(path: str) -> int:
    """Return the main version of a clang; 0 for another compiler."""
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\bclang version (\d+)", printed)
    return int(found[1]) if found else 0


def run(arguments: list[str], source: str = "") -> str:
    """Run clang, with a source as its input if there is one; return its messages, empty if it accepts the source.

    Raises:
        ClangCrashError: it ended by a signal or reported a defect of its own.
    """
    path = compiler()
    assert path is not None, missing()
    done = subprocess.run([path, *arguments], input=source, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        last = done.stderr.strip().splitlines()[-1:] or [""]
        raise ClangCrashError(f"{Path(path).name} crashed with exit code {done.returncode}: {last[0]}")
    return done.stderr if done.returncode else ""


def check(source: MetalSource) -> None:
    """Check a source as Metal's compiler would.

    Raises:
        RefusedSourceError: it would not compile.
        ClangCrashError: clang crashed on it.
    """
    problems = list(lints(source))
    # A macro for the type of one parameter is no change of the source; the instantiation is without its attributes
    text = f"{source.definitions}\ntemplate decltype({source.instance}) {source.instance};\n"
    messages = run([*_CHECK, "-"], text)
    if messages:
        problems.append(messages)
    if problems:
        raise RefusedSourceError("\n".join(problems))


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_TYPES = r"float|half|bfloat|bfloat16_t|int|uint|bool|char|uchar|short|ushort|long|ulong|u?int(?:8|16|32|64)_t|size_t"
_SPACES = {"device", "constant", "threadgroup", "thread", "GLOBAL", "LOCAL", "SHARED"}
_FUNCTION = re.compile(r"\b(\w+)\((?:[^()]|\([^()]*\))*\) (?:const )?\{")


def lints(source: MetalSource) -> Iterator[str]:
    """Yield what Metal's compiler refuses in a source and clang's check does not."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"line {number}: {line.strip()}: not ASCII"
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), source.text)
    for number, line in enumerate(text.splitlines(), 1):
        if "long long" in line:
            yield f"line {number}: {line.strip()}: Metal has no long long"
        if re.search(r"\bdouble\b", line):
            yield f"line {number}: {line.strip()}: Metal has no double"
    buffers = sum(parameter.attribute == "buffer" for parameter in source.parameters)
    if buffers > MOST_BUFFERS:
        yield f"{buffers} buffers: Metal has {MOST_BUFFERS}"
    yield from _pointers(text)
    yield from _recursions(text)


def _pointers(text: str) -> Iterator[str]:
    """Yield each parameter or variable that points or refers to memory of no address space."""
    types = "|".join([_TYPES, *re.findall(r"\btypename (\w+)", text)])
    for found in re.finditer(rf"[(,;{{}}]\s*((?:\w+ )*)(?:{types})(?: const)?\s*(?:[*&]\s*|\(&)\w+", text):
        if not _SPACES & set(found[1].split()):
            number = text.count("\n", 0, found.end()) + 1
            yield f"line {number}: {found[0][1:].strip()}: a pointer or reference needs an address space"


def _recursions(text: str) -> Iterator[str]:
    """Yield each function that calls itself, through others too."""
    bodies: dict[str, str] = {}
    for found in _FUNCTION.finditer(text):
        if found[1] not in ("for", "if", "while", "switch"):
            bodies[found[1]] = bodies.get(found[1], "") + _block(text, found.end() - 1)
    calls = {
        name: {other for other in bodies if re.search(rf"\b{other}\b[^;()]*\(", body)} for name, body in bodies.items()
    }
    for name in bodies:
        reached: set[str] = set()
        ahead = set(calls[name])
        while ahead:
            reached |= ahead
            ahead = {further for other in ahead for further in calls[other]} - reached
        if name in reached:
            yield f"{name} calls itself: Metal has no recursion"


def _block(text: str, begin: int) -> str:
    """Return the block in braces that begins at a place."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin : at + 1]
    return text[begin:]
