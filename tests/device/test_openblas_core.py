import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.device import openblas_core
from tests.conftest import REPOSITORY

_LIBRARY = "libopenblas.so.0"

#: Loads OpenBLAS as if it had taken this processor for an old one, and prints the cores and the variable.
_SCRIPT = f"""
import os
from mlxflow.device import openblas_core
kinds = iter(['Prescott'])
plain = openblas_core.core_of
openblas_core.core_of = lambda library: next(kinds, None) or plain(library)
library = openblas_core.load({_LIBRARY!r})
print(plain(library), os.environ.get('OPENBLAS_CORETYPE'), library.openblas_get_num_threads() > 0)
"""

_AVX2, _AVX512 = "fpu avx avx2 fma", "fpu avx avx2 fma avx512f avx512bw avx512dq avx512vl"


def _printed(script: str, **environment: str) -> list[str]:
    variables = {"PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=variables)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("cpuinfo", "core"),
    [
        (f"processor: 0\nflags\t\t: {_AVX512}\n", "SkylakeX"),
        (f"processor: 0\nflags\t\t: {_AVX2}\n", "Haswell"),
        (f"processor: 0\nflags\t\t: {_AVX2} avx512f\n", "Haswell"),
        ("processor: 0\nflags\t\t: fpu sse3\n", None),
        ("processor: 0\nFeatures\t: fp asimd\n", None),
    ],
)
def test_the_best_core_has_only_instructions_of_the_processor(
    cpuinfo: str, core: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(openblas_core, "_FLAGS", tmp_path / "cpuinfo")
    assert openblas_core.best_core() == core


_HAS_AVX2 = pytest.mark.skipif(openblas_core.best_core() is None, reason="needs an x86-64 processor with AVX2")


@_HAS_AVX2
def test_openblas_is_loaded_again_where_it_does_not_know_the_processor() -> None:
    core = str(openblas_core.best_core())
    assert _printed(_SCRIPT) == [core, core, "True"]


@_HAS_AVX2
def test_a_core_that_the_user_names_is_kept() -> None:
    assert _printed(_SCRIPT, OPENBLAS_CORETYPE="Sandybridge") == ["Sandybridge", "Sandybridge", "True"]


@_HAS_AVX2
def test_matrix_products_have_avx2_at_least() -> None:
    script = f"from mlxflow.device import openblas_core as c; print(c.core_of(c.load({_LIBRARY!r})))"
    assert _printed(script)[0].lower() not in openblas_core._OLD_CORES
