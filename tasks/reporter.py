"""The output of `doit`: a line for each stage, with the reasons if it runs, its figures when done, and a summary."""

import time
from typing import Any

from doit.exceptions import BaseFail
from doit.globals import Globals
from doit.reporter import ConsoleReporter

from mlxflow.messages import terminal
from mlxflow.storage import layout
from mlxflow.tasks.stage_store import FROM_THE_STORE


class StageReporter(ConsoleReporter):  # type: ignore[misc]  # doit has no types
    """Prints why each stage runs; the process of a failed stage has printed its error."""

    desc = "a line a stage with the reason if it runs, its key figures when done, and a summary of the build"

    def __init__(self, outstream: Any, options: dict[str, Any]) -> None:
        super().__init__(outstream, options)
        self._begin = time.perf_counter()
        self._built: list[Any] = []
        self._num_fresh = 0

    def write(self, text: str) -> None:
        """Write a line with control characters escaped."""
        super().write(terminal.one_line(text.removesuffix("\n")) + "\n")

    def execute_task(self, task: Any) -> None:
        """Print why a stage runs; groups of variants run nothing."""
        if task.actions:
            reasons = task.meta["freshness"].reasons if task.meta else []
            self.write(f".  {task.name}: {'; '.join(reasons) or 'asked to run'}\n")
            self.outstream.flush()

    def add_success(self, task: Any) -> None:
        """Print the key figures of a stage that was built; a stage whose report has none gets no line."""
        if not task.meta or not task.actions:
            return
        from mlxflow.tasks.build_summary import key_figures, read_report

        node = task.meta["node"]
        self._built.append(node)
        if task.actions[0].is_taken:
            self.write(f"ok {node.task}: {FROM_THE_STORE}\n")
            self.outstream.flush()
        elif report := read_report(node):
            figures = key_figures(node.task, report)
            self.write(f"ok {node.task}: {task.values.get('seconds', 0.0):,.1f} s{', ' if figures else ''}{figures}\n")
            self.outstream.flush()

    def skip_uptodate(self, task: Any) -> None:
        """Print that a stage is fresh."""
        if not task.has_subtask:
            self._num_fresh += 1
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
        """Print what was built, and doit's own errors."""
        if any((node.root / node.folder / layout.REPORT).is_file() for node in self._built):
            from mlxflow.tasks.build_summary import closing_lines

            for line in closing_lines(self._built, self._num_fresh, time.perf_counter() - self._begin):
                self.write(f"{line}\n")
        for line in "".join(f"{error}\n" for error in self.runtime_errors).splitlines():
            self.write(line)
