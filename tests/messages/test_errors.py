import copy

import pytest

from mlxflow.messages import errors
from mlxflow.messages.errors import (
    ArtifactError,
    CallError,
    SourceError,
    StageError,
    UserError,
    WorkflowError,
    reason_of,
)


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(StageError, 1), (WorkflowError, 2), (SourceError, 2), (ArtifactError, 2), (CallError, 2)]
)
def test_exit_codes_of_errors(kind: type[errors.MlxflowError], exit_code: int) -> None:
    assert kind("a").exit_code == exit_code
    assert str(kind("a")) == "a"


def test_a_user_error_has_one_line_for_each_problem() -> None:
    error = UserError("a\nb: wrong", "c: missing")
    assert error.problems == ("a\\nb: wrong", "c: missing")
    assert str(error) == "a\\nb: wrong\nc: missing"


def test_an_error_of_several_lines_is_the_same_after_a_worker_process_sent_it() -> None:
    error = SourceError("a\nb: wrong", "c: missing")
    sent = copy.copy(error)  # as `pickle` makes it
    assert type(sent) is SourceError
    assert (str(sent), sent.problems) == (str(error), error.problems)


def test_reason_of_an_exception_is_one_short_line() -> None:
    assert reason_of(ValueError("cannot  be\n\tread ")) == "cannot be read"
    assert reason_of(ValueError("x" * 300)) == "x" * 200
    assert reason_of(ValueError("x" * 300), None) == "x" * 300
