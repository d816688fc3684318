import re

import pytest

from mlxflow.data import guard, watched
from mlxflow.data.guard import ProcessLimits
from mlxflow.messages.errors import SourceError
from tests.data.test_guard import (
    _TEMPLATE,
    _USUAL,
    _Job,
    job,  # noqa: F401
)


def test_a_template_that_is_slow_for_every_record_is_one_line(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(guard, "LIMITS", ProcessLimits(seconds=60, run_seconds=1, run_seconds_per_text=0.001))
    line = job.fails(
        job.template("{% for i in range(25) %}{% for j in range(90000) %}{% endfor %}{% endfor %}" + _USUAL)
    )
    number = r"[\d,]+"
    assert re.fullmatch(
        f"{re.escape(_TEMPLATE)} took {number} s of processor time for {number} texts of {number} bytes in all, "
        f"{number} bytes a second\\. Fix it or name another\\.",
        line,
    )


def test_the_time_budget_grows_with_the_size_of_the_work() -> None:
    run_check = guard._check_run
    usual = guard.LIMITS
    run_check({"a": usual.run_seconds + 1}, 100_000_000, 0)
    run_check({"a": usual.run_seconds + 1}, 100, 1_000)
    with pytest.raises(SourceError) as caught:
        run_check({"a": 1.0, "b": 360_000.0}, 40_000_000, 40_000)
    assert str(caught.value) == (
        "b took 360,000 s of processor time for 40,000 texts of 40,000,000 bytes in all, 111 bytes a second. "
        "Fix it or name another."
    )


def test_all_work_of_a_process_counts_but_repeated_subjects_do_not() -> None:
    before = watched._board.worked_on()
    with watched.Work("a", size=10), watched.Work("b", "file", 5, own=1000) as work:
        assert max(one.size for one in watched._board.announced()) == 1005
        work.step(1)
        work.step(2, 7)
    with watched.Work("a"):
        pass
    size, texts = watched._board.worked_on()
    assert (size - before[0], texts - before[1]) == (22, 3)
