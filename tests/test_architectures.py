"""Every architecture with every method: some of the cases by default, all of them with `pytest -m matrix`."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.architecture_configs import DENSE, MIXTURES
from benchmarks.architectures import CASES, SETTINGS, Jobs, Outcome, table
from mlxflow.quantization import calibrated
from tests.conftest import REPOSITORY

ARCHITECTURES = [*DENSE, *MIXTURES]

#: Of so many architectures one is rounded and compiled by default, too.
EVERY = 5

#: What each architecture is tried with by default: one case in turn.
OTHERS = [name for name in CASES if name != "rtn"]


def _cases() -> list[Any]:
    """Return every pair of architecture and case; those that are not tried by default are marked."""
    pairs = []
    for place, architecture in enumerate(ARCHITECTURES):
        default = {OTHERS[place % len(OTHERS)], *(["rtn"] if place % EVERY == 0 else [])}
        for name in CASES:
            marks = [] if name in default else [pytest.mark.matrix]
            pairs.append(pytest.param(architecture, name, marks=marks, id=f"{architecture}-{name}"))
    return pairs


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("architectures"))


@pytest.fixture
def _few_compile(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the graphs of every fifth architecture by default: g++, started for each kernel, is most of the time."""
    place = ARCHITECTURES.index(request.node.callspec.params["architecture"])
    if place % EVERY and not request.node.get_closest_marker("matrix"):
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(("architecture", "name"), _cases())
@pytest.mark.usefixtures("_few_compile")
def test_every_architecture_case_works(
    jobs: Jobs, architecture: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "_AWQ_STEPS", 8)  # few: the search is tested by itself
    outcome = jobs.case(architecture, name, settings=(SETTINGS[0], SETTINGS[-1]))
    assert outcome.works, outcome.refusal


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_matches_mlx_lm_in_every_setting(jobs: Jobs, architecture: str) -> None:
    assert jobs.case(architecture, "rtn").works


def test_every_method_is_tested_on_dense_models_and_mixtures_by_default() -> None:
    tried = {(one.values[0], one.values[1]) for one in _cases() if not one.marks}
    for kind in (DENSE, MIXTURES):
        assert {name for architecture, name in tried if architecture in kind} == set(CASES)


def test_the_page_has_a_row_for_each_architecture_and_names_what_is_refused() -> None:
    outcomes = {architecture: {name: Outcome(works=True) for name in CASES} for architecture in ("llama", "gpt2")}
    outcomes["gpt2"] |= {"awq": Outcome(works=False, refusal="no such thing")}
    page = table(outcomes)
    rows = [line for line in page.splitlines() if line.startswith(("| llama", "| gpt2"))]
    assert [row.count("| yes") for row in rows] == [len(CASES) + 2, len(CASES) - 1]
    assert "| no [1] |" in rows[1]
    assert "\n1. no such thing\n" in page
    assert f"{2 * len(CASES) - 1} of {2 * len(CASES)} cases work" in page


def test_the_page_in_docs_has_these_rows_and_columns() -> None:
    page = (REPOSITORY / "docs/architectures.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert rows[0][: len(CASES) + 1] == ["architecture", *CASES]
    assert [row[0] for row in rows[2:]] == ARCHITECTURES
