import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.device import cpu_backend

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS of its own")

DENORMAL_PRODUCT = """
import mlx.core as mx
own = float('5e-324') > 0 and float('1e-310') * float('0.5') > 0  # not folded by the compiler
print((mx.array([1e-20], mx.float32) * mx.array([1e-20], mx.float32)).item() == 0, own)
"""


def _run(script: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return result.stdout.strip()


def test_a_blas_of_the_system_is_loaded_before_mlx() -> None:
    script = (
        "from mlxflow.device import cpu_backend; print(cpu_backend.prepare()); print(open('/proc/self/maps').read())"
    )
    name, _, maps = _run(script).partition("\n")
    if name == "None":
        pytest.skip("no OpenBLAS or MKL on this system")
    loaded = next(line.split()[-1] for line in maps.splitlines() if Path(line.split()[-1]).name.startswith(name[:9]))
    assert maps.index(loaded) >= 0
    assert "libmlx.so" in maps


def test_the_matrix_products_of_mlx_are_those_of_the_blas(tmp_path: Path) -> None:
    script = (
        "from mlxflow.device import cpu_backend; name = cpu_backend.prepare()\n"
        "import mlx.core as mx\n"
        "a = mx.ones((64, 64))\n"
        "mx.eval(mx.matmul(a, a, stream=mx.cpu))\n"
        "print(name)"
    )
    name = _run(script, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "linker"))
    if name == "None":
        pytest.skip("no OpenBLAS or MKL on this system")
    told = "".join(path.read_text() for path in tmp_path.iterdir())
    found = [line for line in told.splitlines() if "libmlx.so" in line and "`cblas_sgemm'" in line]
    assert len(found) == 1
    assert f"/{name}" in found[0].partition(" to ")[2]


def test_mlx_flushes_denormals_and_python_does_not() -> None:
    assert _run("from mlxflow.device import cpu_backend; cpu_backend.prepare()" + DENORMAL_PRODUCT) == "True True"
    assert _run(DENORMAL_PRODUCT) == "False True"


KERNEL = """
from mlxflow.device import cpu_backend
cpu_backend.prepare_compiler()
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(mx.compile(lambda x: mx.exp(x) * 2)(mx.array([0.0])).item())
"""


def test_the_header_of_mlx_is_read_once_for_all_kernels(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this system")
    told = tmp_path / "told"
    wrapper = tmp_path / "bin/g++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" -H "$@" 2>> "{told}"\n')  # -H tells of each file that is read
    wrapper.chmod(0o755)
    environment = {"TMPDIR": str(tmp_path), "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    assert _run(KERNEL, **environment) == "2.0"
    kept = [line for line in told.read_text().splitlines() if line.startswith("! ")]  # a precompiled header that fits
    assert [Path(line[2:]).name for line in kept] == ["compiled_preamble.h.gch"]
    told.unlink()
    assert _run(KERNEL.replace("2)", "3)"), **environment) == "3.0"
    assert [line for line in told.read_text().splitlines() if line.endswith(".h")] == []


def test_kernels_compile_without_a_cached_header(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this system")
    wrapper = tmp_path / "bin/g++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *c++-header*) exit 1 ;; esac\nexec "{compiler}" "$@"\n')
    wrapper.chmod(0o755)
    environment = {"TMPDIR": str(tmp_path), "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    assert _run(KERNEL, **environment) == "2.0"
    assert list(tmp_path.rglob("*.gch")) == []


def test_missing_libraries_are_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "prepare", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cpu_backend.notice("cpu") == (
        "mlxflow: the CPU backend lacks OpenBLAS (matrix products run about 15 times slower without it) and "
        "g++ (mx.compile silently runs uncompiled without it). Run: sudo apt-get install -y libopenblas0-pthread g++"
    )


def test_nothing_is_reported_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "prepare", lambda: "libopenblas.so.0")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    assert cpu_backend.notice("cpu") is None
