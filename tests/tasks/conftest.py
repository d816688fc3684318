"""What the tests of doit's verbs share: a chain of cheap stages, built once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from tests.chain import Chain


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a chain whose every stage was run; tests only look at it."""
    chain = Chain(tmp_path_factory.mktemp("template") / "chain")
    assert chain.doit()[0] == 0
    return chain.folder


@pytest.fixture
def chain(template: Path, tmp_path: Path) -> Chain:
    """A copy of the built chain, to be changed."""
    shutil.copytree(template, tmp_path / "chain")
    return Chain(tmp_path / "chain")
