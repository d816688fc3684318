"""What the tests of the page share: one of a very long run, which takes its time to draw."""

import time
from pathlib import Path

import pytest

from mlxflow.report.render import render
from tests.conftest import made_once
from tests.report.runs import read, write_curve, write_run, write_timeline


@pytest.fixture(scope="session")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose learning curve and timeline have 100,000 points each."""
    return made_once(tmp_path_factory, "long", _draw) / "index.html"


def _draw(root: Path) -> None:
    write_run(root)
    write_curve(root, 100_000)
    write_timeline(root, 100_000)
    begin = time.process_time()
    (root / "index.html").write_bytes(render([read(root)]))
    assert time.process_time() - begin < 60  # no more than a guard against what never ends


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path)
    return tmp_path
