"""Faults at file calls of doit and its stages: after another run all is as if there had been none.

By default a sample of the calls; all of them: `pytest -m faults tests/faults`.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.builds import COMMANDS, REAL, Scenario, UnmetError, disturb
from tests.faults.injection import KINDS, TRIED_AT_EVERY_CALL, Fault, Injector

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

#: The last calls that a run may not come to; see `UnmetError`. A file that is digested within a tick of the clock after
#: it was written is read again by the next stage: five calls, which a slow run does not make.
_MOST_UNMET = 10

Scenarios = Callable[[str], Scenario]


@pytest.mark.parametrize(("name", "kind", "part"), SAMPLE)
def test_a_fault_is_named_and_the_next_run_recovers(
    injector: Injector, scenario: Scenarios, tmp_path: Path, name: str, kind: str, part: float
) -> None:
    calls = scenario(name).numbers(kind)
    disturb(injector, scenario(name), Fault(kind, calls[int(part * len(calls))]), tmp_path / "project")


@pytest.mark.parametrize(("name", "kind", "part", "times", "each"), ROWS)
def test_consecutive_faults_are_named_and_the_next_run_recovers(
    injector: Injector, scenario: Scenarios, tmp_path: Path, name: str, kind: str, part: float, times: int, each: int
) -> None:
    calls = scenario(name).numbers(kind)
    fault = Fault(kind, calls[int(part * len(calls))], times, each)
    disturb(injector, scenario(name), fault, tmp_path / "project")


def _number(scenario: Scenario, name: str, path: str, *, after: str) -> int:
    """Return the number of the first call of a name on a path after one on another path."""
    root = Path(scenario.calls[0].path).parent
    begin = next(call.number for call in scenario.calls if call.path.endswith(after))
    return next(
        call.number
        for call in scenario.calls
        if call.number > begin and call.name == name and os.path.relpath(call.path, root) == path
    )


@pytest.mark.parametrize("kind", ["EROFS", "EACCES"])
def test_without_a_lock_nothing_is_built(injector: Injector, scenario: Scenarios, tmp_path: Path, kind: str) -> None:
    """The folder of state alone cannot be made: a build would do without it until it ends."""
    first = scenario("first")
    folder = Path(shutil.copytree(first.template, tmp_path / "project"))
    number = _number(first, "mkdir", "artifacts/.mlxflow", after="/artifacts")
    code, out, err, _ = injector.run(folder, "run", fault=Fault(kind, number))
    reason = os.strerror(KINDS[kind])
    line = f"artifacts/.mlxflow: {reason}. Let it be written or choose another folder.\n"
    assert (code, err) == (2, line)
    assert out == ".  s1: never built\n!! s1: failed; its artifact is unchanged\n"
    assert not (folder / "artifacts/s1").exists()


@pytest.mark.parametrize("kind", ["EIO", "EACCES", "ENAMETOOLONG", "ELOOP"])
def test_an_input_whose_stat_fails_is_named_with_the_reason(
    injector: Injector, scenario: Scenarios, tmp_path: Path, kind: str
) -> None:
    first = scenario("first")
    done = Path(shutil.copytree(first.template, tmp_path / "done"))
    assert injector.run(done, "run").code == 0
    calls = injector.run(Path(shutil.copytree(done, tmp_path / "seen")), "run").calls
    numbers = [call.number for call in calls if call.name == "stat" and Path(call.path).name == "source"]
    assert numbers
    for number in numbers:
        folder = Path(shutil.copytree(done, tmp_path / str(number)))
        outcome = injector.run(folder, "run", fault=Fault(kind, number))
        assert outcome.code == 0
        assert outcome.out == f".  s1: source cannot be read ({os.strerror(KINDS[kind])})\n-- s2\n"


def test_the_injector_sees_the_calls_of_every_process(scenario: Scenarios) -> None:
    calls = scenario("again").calls
    seen = {(call.name, Path(call.path).name) for call in calls}
    assert {("write", "a"), ("fsync", "a"), ("read", "source"), ("rename", "s1"), ("mkdir", ".s1.partial")} <= seen
    assert {("fsync", "state.jsonl"), ("flock", "lock"), ("write", "s1.log"), ("unlink", "a")} <= seen


def test_a_forked_command_makes_the_calls_of_one_that_starts_an_interpreter(
    injector: Injector, scenario: Scenarios, tmp_path: Path
) -> None:
    command, _ = COMMANDS["first"]
    seen = []
    for fresh in (False, True):
        folder = Path(shutil.copytree(scenario("first").template, tmp_path / f"{fresh}"))
        outcome = injector.run(folder, *command, fresh=fresh)
        made = {(call.name, re.sub(r"\d+", "N", os.path.relpath(call.path, folder))) for call in outcome.calls}
        seen.append((outcome.code, outcome.out, outcome.err, {call for call in made if "__editable__" not in call[1]}))
    assert seen[0] == seen[1]


@pytest.mark.faults
@pytest.mark.parametrize("kind", TRIED_AT_EVERY_CALL)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_system_call_of_a_command_is_injected_once(
    injector: Injector, scenario: Scenarios, tmp_path: Path, name: str, kind: str
) -> None:
    """With a file's name in FAULTS_LOG, each case is written down there when it ends."""
    failures: list[str] = []
    num_unmet = 0
    numbers = scenario(name).numbers(kind)[:: 5 if name in REAL else 1]
    for number in numbers:
        project = tmp_path / str(number)
        problem = ""
        try:
            disturb(injector, scenario(name), Fault(kind, number), project)
        except UnmetError:
            num_unmet += 1
        except AssertionError as error:
            problem = str(error)
            failures.append(problem)
        shutil.rmtree(project)
        if log := os.environ.get("FAULTS_LOG"):
            with Path(log).open("a") as file:
                file.write(f"{name} {kind} {number} {problem!r}\n")
    assert num_unmet <= _MOST_UNMET
    assert not failures, f"{len(failures)} of {len(numbers)}:\n" + "\n".join(failures)
