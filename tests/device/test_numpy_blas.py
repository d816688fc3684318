import sys

import numpy as np
import pytest

from mlxflow.device import numpy_blas


def _threads() -> int:
    functions = numpy_blas._functions()
    return int(functions[0]()) if functions else 1


def _threads_inside(number: float = 1, divisor: float = 1) -> tuple[int, int]:
    with numpy_blas.single_threaded() as count:
        assert number / divisor
        return count, _threads()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NumPy's wheels for macOS use Accelerate")
def test_products_have_one_thread_until_the_block_ends_also_with_an_error() -> None:
    functions = numpy_blas._functions()
    assert functions is not None
    before = _threads()
    functions[1](2)
    try:
        assert _threads_inside() == (2, 1)
        assert _threads() == 2
        with pytest.raises(ZeroDivisionError):
            _threads_inside(1, 0)
        assert _threads() == 2
    finally:
        functions[1](before)


def test_another_blas_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _threads()
    monkeypatch.setattr(numpy_blas, "_functions", lambda: None)
    with numpy_blas.single_threaded() as count:
        assert count == 1
    monkeypatch.undo()
    assert _threads() == before
    assert np.isfinite(np.ones((2, 2)) @ np.ones((2, 2))).all()
