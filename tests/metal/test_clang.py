import subprocess
from pathlib import Path

import pytest

from tests.metal import clang
from tests.metal.capture import MetalSource

_KERNEL = """{header}
template <int THREADS>
[[kernel]] void k(
  const device float* x [[buffer(0)]],
  device float* y [[buffer(1)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {{
{body}
}}

template [[host_name("k")]] [[kernel]] decltype(k<32>) k<32>;

"""


def _source(body: str, header: str = "") -> MetalSource:
    return MetalSource(_KERNEL.format(body=body, header=header))


@pytest.mark.usefixtures("compiler")
def test_a_good_source_is_accepted() -> None:
    header = (
        "enum { WIDTH = 4 };\nconstant float FACTOR = 2.0f;\ninline float twice(thread float& x) { return x * FACTOR; }"
    )
    body = "  const int at = thread_position_in_grid.x;\n  float each = x[at * WIDTH];\n  y[at] = twice(each);"
    clang.check(_source(body, header))


_REFUSED = {
    "a constant of a program without an address space": (
        "",
        "constexpr int WIDTH = 4;",
        "program scope variable must reside in constant address space",
    ),
    "device memory passed as thread memory": (
        "y[0] = first(x);",
        "inline float first(const thread float* x) { return x[0]; }",
        "cannot pass pointer to address space '__global' as a pointer to address space '__private'",
    ),
    "threadgroup memory passed as device memory": (
        "threadgroup float shared[4];\ny[0] = first(shared);",
        "inline float first(const device float* x) { return x[0]; }",
        "no matching function for call to 'first'",
    ),
    "a write to an input": ("x[0] = 1;", "", "read-only variable is not assignable"),
    "a double": ("double sum = 0;", "", "Metal has no double"),
    "a literal of double precision": ("y[0] = x[0] * 1.5;", "", "double precision constant"),
    "a long long": ("y[0] = (long long)x[0];", "", "line 7: y[0] = (long long)x[0];: Metal has no long long"),
    "a pointer to no address space": (
        "float each = x[0];\ny[0] = first(&each);",
        "inline float first(const float* x) { return x[0]; }",
        "line 1: const float* x: a pointer or reference needs an address space",
    ),
    "a reference to no address space": (
        "float each[8];\ny[0] = first(each);",
        "inline float first(float (&x)[8]) { return x[0]; }",
        "line 1: float (&x: a pointer or reference needs an address space",
    ),
    "recursion": (
        "y[0] = down(x[0]);",
        "inline float up(float x);\ninline float down(float x) { return x < 0 ? x : up(x); }\n"
        "inline float up(float x) { return down(x - 1); }",
        "down calls itself: Metal has no recursion",
    ),
    "a character beyond ASCII": ("// \u00fc", "", "line 7: // \u00fc: not ASCII"),
    "a function that Metal lacks": ("y[0] = expf(x[0]);", "", "use of undeclared identifier 'expf'"),
    "a barrier that orders no memory": (
        "metal::threadgroup_barrier(metal::mem_flags::mem_none);",
        "",
        "no member named 'mem_none'",
    ),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("case", _REFUSED)
def test_what_metal_refuses_is_refused(case: str) -> None:
    body, header, message = _REFUSED[case]
    with pytest.raises(clang.RefusedSourceError) as error:
        clang.check(_source(body, header))
    assert message in str(error.value)


@pytest.mark.usefixtures("compiler")
def test_more_buffers_than_metal_has_are_refused() -> None:
    more = "".join(f"  const device float* x{number} [[buffer({number})]],\n" for number in range(2, 32))
    source = MetalSource(_KERNEL.format(body="", header="").replace("  uint3", f"{more}  uint3"))
    with pytest.raises(clang.RefusedSourceError, match=r"^32 buffers: Metal has 31$"):
        clang.check(source)


def _compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Let the search path hold only a compiler of this name, a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    clang.compiler.cache_clear()
    clang.missing.cache_clear()


@pytest.fixture
def _found_again() -> object:
    yield
    clang.compiler.cache_clear()
    clang.missing.cache_clear()


@pytest.mark.usefixtures("_found_again")
@pytest.mark.parametrize(
    ("name", "version", "is_missing"),
    [
        ("clang", "Debian clang version 14.0.6", True),
        ("clang", "Apple clang version 17.0.0 (clang-1700.0.13.3)", True),
        ("clang-19", "Debian clang version 19.1.7 (3~deb12u1)", False),
        ("clang-21", "Ubuntu clang version 21.1.0", False),
        ("gcc", "gcc (Debian 12.2.0-14) 12.2.0", True),
    ],
)
def test_without_clang_19_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str, is_missing: bool
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    _compiler(tmp_path, monkeypatch, name, f"echo '{version}'")
    line = "the stand-in for Metal needs clang 19 or newer: apt-get install clang-19"
    assert clang.missing() == (line if is_missing else "")


@pytest.mark.usefixtures("_found_again")
def test_other_machines_have_no_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clang.missing.cache_clear()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert clang.missing() == "the stand-in for Metal runs on Linux x86_64, not on Darwin arm64"


@pytest.mark.usefixtures("_found_again")
@pytest.mark.parametrize("ends", ["exit 139", "kill -SEGV $$"])
def test_a_crash_of_clang_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    script = f"""case $1 in --version) echo "clang version 19.1.7"; exit;; esac
echo 'PLEASE submit a bug report' >&2; echo 'Stack dump:' >&2; {ends}"""
    _compiler(tmp_path, monkeypatch, "clang", script)
    with pytest.raises(clang.ClangCrashError, match=r"^clang crashed with exit code -?\d+: Stack dump:$"):
        clang.check(_source(""))


@pytest.mark.usefixtures("compiler")
def test_clang_itself_takes_the_flags() -> None:
    path = clang.compiler()
    assert path is not None
    done = subprocess.run([path, *clang._CHECK, "-"], input="int f();", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
