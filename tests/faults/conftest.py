"""The preloaded library and the scenarios, made once."""

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.faults.builds import Scenario, prepare
from tests.faults.injection import Injector


@pytest.fixture(scope="session")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    if not sys.platform.startswith("linux"):
        pytest.skip("faults are injected by a library that is preloaded, which the macOS of signed programs ignores")
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler, cc")
    injector = Injector(tmp_path_factory.mktemp("injector"))
    yield injector
    injector.close()


@pytest.fixture(scope="session")
def scenario(injector: Injector, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scenario]:
    """Return a function from a scenario's name to the scenario, which is made once."""
    return cache(lambda name: prepare(injector, tmp_path_factory.mktemp("scenario"), name))
