import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.storage.host_arrays import numpy_of

PACKAGE = Path(__file__).parents[2] / "mlxflow"

# Arrays of NumPy, of a memory-mapped file or evaluated just before, in modules that use MLX too
OF_NUMPY = {
    "distributed/team.py",
    "evaluation/positions.py",
    "models/gguf_blocks.py",
    "models/gguf_reading.py",
    "models/gguf_writing.py",
    "quantization/work_forecast.py",
    "storage/host_arrays.py",
}


@pytest.mark.parametrize("copy", [True, False])
def test_numbers_are_returned(copy: bool) -> None:
    assert np.array_equal(numpy_of(mx.arange(6).reshape(2, 3) * 2, copy=copy), np.arange(6).reshape(2, 3) * 2)


def test_a_failed_evaluation_is_raised() -> None:
    # In a process of its own. MLX 0.32.4 counts tasks of the CPU, one for ten operations; one that fails stays counted,
    # and whatever is evaluated above the memory limit later waits for it in an endless loop.
    script = """
import mlx.core as mx
from mlxflow.storage.host_arrays import numpy_of
numpy_of(mx.linalg.inv(mx.zeros((3, 3)), stream=mx.cpu) + 1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: [Inverse::eval_cpu] LU factorization failed" in done.stderr


def _conversions(path: Path) -> Iterator[int]:
    """Yield the lines in which a module that uses MLX gives NumPy something that is not written as a list."""
    text = path.read_text()
    if "mlx.core" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("np.array", "np.asarray"):
            continue
        if not isinstance(node.args[0], ast.List | ast.ListComp | ast.Tuple):
            yield node.lineno


def test_no_module_that_uses_mlx_leaves_the_evaluation_to_numpy() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): [*_conversions(path)] for path in PACKAGE.rglob("*.py")}
    assert {path for path, lines in found.items() if lines} == OF_NUMPY
