"""The preloaded library and the scenarios, made once."""

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.builds import Scenario, prepare
from tests.faults.injection import compile_injector


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("faults are injected by a library that is preloaded, which the macOS of signed programs ignores")
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler, cc")
    return compile_injector(tmp_path_factory.mktemp("injector"))


@pytest.fixture(scope="session")
def scenario(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scenario]:
    """Return a function from a scenario's name to the scenario, which is made once."""
    return cache(lambda name: prepare(library, tmp_path_factory.mktemp("scenario"), name))
