"""The output of `doit`: a line for each stage, with the reasons if it runs."""

from typing import Any

from doit.exceptions import BaseFail
from doit.globals import Globals
from doit.reporter import ConsoleReporter

from mlxflow.messages import terminal


class StageReporter(ConsoleReporter):  # type: ignore[misc]  # doit has no types
    """Prints why each stage runs; the process of a failed stage has printed its error."""

    desc = "one line a stage, with the reason for each that runs"

    def write(self, text: str) -> None:
        """Write a line with control characters escaped."""
        super().write(terminal.one_line(text.removesuffix("\n")) + "\n")

    def execute_task(self, task: Any) -> None:
        """Print why a stage runs; groups of variants run nothing."""
        if task.actions:
            reasons = task.meta["freshness"].reasons if task.meta else []
            self.write(f".  {task.name}: {'; '.join(reasons) or 'asked to run'}\n")
            self.outstream.flush()

    def skip_uptodate(self, task: Any) -> None:
        """Print that a stage is fresh."""
        if not task.has_subtask:
            self.write(f"-- {task.name}\n")

    def skip_ignore(self, task: Any) -> None:
        """Print that a stage does not run because it, or a stage that it reads from, is ignored."""
        if not task.has_subtask:
            is_ignored = Globals.dep_manager.status_is_ignore(task)
            until = f", until doit ignore --undo {task.name}" if is_ignored else ", as is a stage that it reads from"
            self.write(f"-- {task.name}: ignored{until}\n")

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        """Print which stage failed."""
        if task.executed:
            is_untouched = all(getattr(action, "is_untouched", True) for action in task.actions)
            self.write(
                f"!! {task.name}: failed; its artifact {'is unchanged' if is_untouched else 'was replaced before'}\n"
            )
        else:
            self.write(f"!! {task.name}: not run ({fail.message.strip()})\n")

    def complete_run(self) -> None:
        """Print doit's own errors."""
        for line in "".join(f"{error}\n" for error in self.runtime_errors).splitlines():
            self.write(line)
