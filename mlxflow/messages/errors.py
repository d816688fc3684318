"""Every error that mlxflow raises on purpose.

    MlxflowError          exit code 1: a stage failed
    ├── StageError        a stage could not finish its work (a full disk, a loss that is not finite)
    └── UserError         exit code 2: something the user wrote is wrong; one line a problem
        ├── WorkflowError   the workflow file
        ├── SourceError     a source text, or too little of it
        ├── ArtifactError   an artifact that is missing, damaged or of the wrong kind
        ├── CallError       the command line, or arguments given from Python
        └── StoreError      the shared store: missing, refused, or with damaged content

A message has the shape `file: key.path = value: what was expected. What to do.`
"""

from typing import Any

from mlxflow.messages.terminal import one_line


class MlxflowError(Exception):
    """Base of all errors raised on purpose; `str(error)` is what the user reads."""

    exit_code = 1


class StageError(MlxflowError):
    """A stage could not finish; its old artifact is unchanged."""


class UserError(MlxflowError):
    """One or more mistakes in what the user wrote, all found at once.

    Args:
        problems: one finished line for each mistake, in the order of the file.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(one_line, problems))  # a name of a file may hold a newline
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy in another process is made of: of the message, it would escape the ends of lines."""
        return type(self), self.problems


class WorkflowError(UserError):
    """The workflow file has errors."""


class SourceError(UserError):
    """A source of text cannot be used."""


class ArtifactError(UserError):
    """An artifact is missing, damaged or of the wrong kind."""


class CallError(UserError):
    """A command or function was called with wrong arguments."""


class StoreError(UserError):
    """The shared store is missing, refuses, or has damaged content."""


def reason_of(error: BaseException, max_length: int | None = 200) -> str:
    """Return an exception's message with its line breaks and runs of spaces as one space, shortened to a length."""
    return " ".join(str(error).split())[:max_length]
