"""The files that the tasks of an evaluation read, each looked into before any model is trained."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from mlxflow.evaluation import lm_eval_files, task_file
from mlxflow.evaluation.task_table import TaskTable
from mlxflow.storage.toml_tables import Problem


class FileFinder(Protocol):
    """Finds files by their names as written; what it notes is reported before any stage runs."""

    def checked_file(self, name: str, key: str, mistakes: Callable[[Path, str], Iterable[str]]) -> Path | None:
        """Return a file, or note that it is missing; `mistakes` yields lines about what is wrong in it."""
        ...

    def note(self, problem: Problem) -> None:
        """Note a mistake in the table."""
        ...


def task_files(task: TaskTable, key: str, finder: FileFinder, *, trusts_code: bool) -> tuple[Path, ...]:
    """Return the file of a task and those that it reads; mistakes in them are noted.

    Args:
        task: with a file.
        key: of the stage's table, for messages.
        finder: finds the files.
        trusts_code: whether Python code that the task names may run.
    """
    if task.is_own:
        chat = f'chat = "{task.chat}"'

        def mistakes(path: Path, shown: str) -> Iterator[str]:
            return task_file.mistakes_in(path, shown, may_chat=task.chat != "never", chat_key=chat)

        file = finder.checked_file(task.source, key, mistakes)
        return () if file is None else (file,)
    read: list[lm_eval_files.TaskYaml] = []

    def look(path: Path, shown: str) -> Iterator[str]:
        read.append(lm_eval_files.read_task_yaml(path))
        if read[0].problem:
            yield f"{shown}: {read[0].problem}. Fix the file."

    file = finder.checked_file(task.source, key, look)
    if file is None or not read or read[0].problem:
        return () if file is None else (file,)
    if read[0].code and not trusts_code:
        expected = f"names Python code of its own, {read[0].code[0]}"
        finder.note(
            Problem(
                key, task.source, expected, "Read it, then set trust_remote_code = true in the stage's table to run it."
            )
        )
    above = Path(task.source).parent
    others = [file]
    for name in dict.fromkeys((*read[0].included, *read[0].data, *read[0].code)):
        if (other := finder.checked_file((above / name).as_posix(), key, lambda *_: ())) is not None:
            others.append(other)
    return tuple(others)
