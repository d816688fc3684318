"""Faults at file calls of doit and its stages: after another run all is as if there had been none.

By default a sample of the calls; all of them: `pytest -m faults tests/faults`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.builds import COMMANDS, REAL, Scenario, disturb
from tests.faults.injection import KINDS, Fault

#: Scenario, kind, and which of the calls that can meet it, as a part of all of them.
SAMPLE = [
    *[("first", "KILL", part) for part in (0.2, 0.5, 0.95)],
    *[("first", "EIO", part) for part in (0.3, 0.45, 0.6, 0.9)],
    *[("again", "KILL", part) for part in (0.4, 0.6)],
    *[("again", "EIO", part) for part in (0.35, 0.55, 0.75)],
    *[("first", kind, part) for kind in ("ENOSPC", "EMFILE", "HALF") for part in (0.3, 0.7)],
    *[("again", kind, 0.5) for kind in ("EDQUOT", "EROFS", "ENFILE", "EINTR", "HALF")],
    *[(name, "EIO", 0.8) for name in ("clean", "forget", "pack", "unpack")],
    *[(name, "KILL", 0.6) for name in ("clean", "unpack")],
    ("pretokenize", "EIO", 0.6),
]

#: Of a disk that stays full or broken, and of faults that come again and again: first call, times, calls between.
ROWS = [("first", "ENOSPC", 0.5, 10**6, 1), ("again", "EIO", 0.5, 3, 11), ("again", "HALF", 0.0, 10**6, 2)]

Scenarios = Callable[[str], Scenario]


@pytest.mark.parametrize(("name", "kind", "part"), SAMPLE)
def test_a_fault_is_named_and_the_next_run_mends_it(
    library: Path, scenario: Scenarios, tmp_path: Path, name: str, kind: str, part: float
) -> None:
    calls = scenario(name).numbers(kind)
    disturb(library, scenario(name), Fault(kind, calls[int(part * len(calls))]), tmp_path / "project")


@pytest.mark.parametrize(("name", "kind", "part", "times", "each"), ROWS)
def test_faults_in_a_row_are_named_and_the_next_run_mends_them(
    library: Path, scenario: Scenarios, tmp_path: Path, name: str, kind: str, part: float, times: int, each: int
) -> None:
    calls = scenario(name).numbers(kind)
    fault = Fault(kind, calls[int(part * len(calls))], times, each)
    disturb(library, scenario(name), fault, tmp_path / "project")


def test_the_injector_sees_the_calls_of_every_process(scenario: Scenarios) -> None:
    calls = scenario("again").calls
    seen = {(call.name, Path(call.path).name) for call in calls}
    assert {("write", "a"), ("fsync", "a"), ("read", "source"), ("rename", "s1"), ("mkdir", ".s1.partial")} <= seen
    assert {("fsync", "state.jsonl"), ("flock", "lock"), ("write", "s1.log"), ("unlink", "a")} <= seen


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_of_a_command_may_meet_a_fault(
    library: Path, scenario: Scenarios, tmp_path: Path, name: str, kind: str
) -> None:
    failures = []
    numbers = scenario(name).numbers(kind)[:: 50 if name in REAL else 1]
    for number in numbers:
        try:
            disturb(library, scenario(name), Fault(kind, number), tmp_path / str(number))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} of {len(numbers)}:\n" + "\n".join(failures)
