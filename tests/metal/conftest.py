"""Fixtures of the tests that use the stand-in for Metal."""

import os
from collections.abc import Iterator

import pytest

from tests.metal import clang, execution, stand_in


@pytest.fixture(scope="session", autouse=True)
def _programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled programs where all processes of this run find them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "metal-programs"
    folder.mkdir(exist_ok=True)
    execution.keep_programs(folder)


@pytest.fixture
def compiler() -> None:
    """Skip a test where clang is missing or too old."""
    if clang.missing():
        pytest.skip(clang.missing())


@pytest.fixture
def metal(compiler: None) -> Iterator[type[stand_in.StandInKernel]]:
    """Let MLX's custom kernels run as on a Mac."""
    with stand_in.metal() as kernels:
        yield kernels
