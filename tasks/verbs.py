"""doit's own commands for stages: list, info, clean, forget, ignore, dumpdb and others."""

import json
import sys
from functools import cached_property
from typing import Any

from doit.cmd_clean import Clean
from doit.cmd_completion import TabCompletion
from doit.cmd_dumpdb import DumpDB
from doit.cmd_forget import Forget
from doit.cmd_help import Help
from doit.cmd_ignore import Ignore
from doit.cmd_info import Info
from doit.cmd_list import List
from doit.cmd_resetdep import ResetDep
from doit.cmd_strace import Strace
from doit.exceptions import InvalidDodoFile

from mlxflow.messages import terminal
from mlxflow.tasks.selection import Selection, refuse, unknown_name_message
from mlxflow.tasks.verb import StageVerb, Verb, loads_stages

_LEFTOVERS = {
    "name": "leftovers",
    "long": "leftovers",
    "type": bool,
    "default": False,
    "help": "remove the artifacts of stages and variants that no longer exist, and nothing else",
}

_UNDO = {
    "name": "undo",
    "long": "undo",
    "type": bool,
    "default": False,
    "help": "stop ignoring these stages",
}


class StageList(Verb, List):  # type: ignore[misc]  # doit has no types
    """`doit list`; a group of variants is fresh if every variant is. `S`: it will be taken from the store."""

    name = "list"
    doc_purpose = "list stages, with --status whether each is fresh"
    doc_usage = "[STAGE ...]"

    def _print_task(self, template: str, task: Any, status: bool, list_deps: bool, tasks: dict[str, Any]) -> None:
        if not self.is_of_stages:
            super()._print_task(template, task, status, list_deps, tasks)
            return
        values = {"name": task.name, "doc": task.doc} | ({"status": self._status(task, tasks)} if status else {})
        try:
            line = template.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            known = ", ".join(f"{{{name}}}" for name in values)
            refuse(f"--template {template.rstrip()!r}: cannot be filled in ({error}). Known: {known}.")
        self.outstream.write(line)
        for name in sorted(task.file_dep) if list_deps else ():
            self.outstream.write(f" -  {name}\n")

    def _status(self, task: Any, tasks: dict[str, Any]) -> str:
        members = [tasks[name] for name in task.task_dep] if task.has_subtask else [task]
        states = {self._status_of(member, tasks) for member in members}
        return next((status for status in "RSIU" if status in states), "U")

    def _status_of(self, task: Any, tasks: dict[str, Any]) -> str:
        if self.dep_manager.status_is_ignore(task):
            return "I"
        if self.dep_manager.get_status(task, tasks).status == "up-to-date":
            return "U"
        return "S" if task.name in self._taken else "R"

    @cached_property
    def _taken(self) -> set[str]:
        """The stages that will be taken from the store of the workflow, if it has one."""
        graph = Selection(self)
        if graph.store.table is None:
            return set()
        from mlxflow.workflow.staleness import find_stale

        return graph.store.foresee(find_stale(graph.nodes, graph.record, graph.cache, graph.is_ignored))


class StageInfo(Verb, Info):  # type: ignore[misc]
    """`doit info`."""

    name = "info"
    doc_purpose = "show what a stage reads and writes, its last run, and why it is stale"
    doc_usage = "STAGE"

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> int:
        if not self.is_of_stages:
            return int(super()._execute(pos_args, hide_status) or 0)
        from mlxflow.tasks.description import describe

        if len(pos_args) != 1:
            refuse("expected one stage. Use: doit info STAGE")
        graph = Selection(self)
        is_stale = False
        for number, node in enumerate(graph.select(pos_args)):
            stale, lines = describe(node, graph, hide_status=hide_status)
            lines = ["", *lines] if number else lines
            is_stale |= stale
            terminal.show(*lines)
        return int(is_stale)


class StageClean(Verb, Clean):  # type: ignore[misc]
    """`doit clean`."""

    name = "clean"
    doc_purpose = "remove artifacts"
    doc_usage = "[STAGE ...]"
    cmd_options = (*Clean.cmd_options, _LEFTOVERS)

    def clean_tasks(self, tasks: Any, dryrun: bool, cleanforget: bool) -> None:
        """Remove the artifact of each stage once."""
        if not self.is_of_stages:
            super().clean_tasks(tasks, dryrun, cleanforget)
            return
        from mlxflow.tasks.cleaning import remove_unfinished
        from mlxflow.tasks.creator import remove_artifact

        for task in {task.name: task for task in tasks}.values():
            if task.meta:
                self._freed_bytes += remove_artifact(task.meta["node"], dryrun)
                self._freed_bytes += remove_unfinished(task.meta["node"], dryrun)
            if cleanforget and not dryrun:
                self.journal.remove(task.name)
        self.dep_manager.close()

    def _execute(  # type: ignore[no-untyped-def]  # doit passes options by the names in this signature
        self, dryrun, cleandep, cleanall, cleanforget, leftovers, pos_args=None
    ) -> None:
        def clean() -> None:
            super(StageClean, self)._execute(dryrun, cleandep, cleanall, cleanforget, pos_args)

        if not self.is_of_stages:
            clean()
            return
        from mlxflow.tasks.cleaning import freed_message, remove_leftovers

        self._freed_bytes = 0
        graph = Selection(self)
        if leftovers and pos_args:
            refuse("--leftovers: removes the artifacts of removed stages and takes no stage names. Leave them out.")
        with self.alone():
            if not leftovers:
                clean()
            self._freed_bytes += remove_leftovers(graph.nodes, is_wanted=leftovers, dryrun=dryrun)
            if not dryrun and (line := freed_message(self._freed_bytes, graph.cache)):
                terminal.show(line)


class StageForget(Verb, Forget):  # type: ignore[misc]
    """`doit forget`; a forgotten stage is not adopted from the lock file."""

    name = "forget"
    doc_purpose = "make fresh stages run again"
    doc_usage = "[STAGE ...]"

    def _execute(self, forget_sub: bool, forget_disable_default: bool, forget_all: bool) -> None:
        if not self.is_of_stages:
            super()._execute(forget_sub, forget_disable_default, forget_all)
            return
        stages = {node.task for node in Selection(self).nodes}

        def forget(name: str) -> None:
            if name in stages and self.journal.in_(name):
                self.journal.forget(name)

        def forget_every() -> None:
            for name in stages:
                forget(name)

        self.dep_manager.remove, self.dep_manager.remove_all = forget, forget_every
        with self.alone():
            super()._execute(forget_sub, forget_disable_default, forget_all)


class StageIgnore(Verb, Ignore):  # type: ignore[misc]
    """`doit ignore`: a stage and its readers do not run until `doit ignore --undo`."""

    name = "ignore"
    doc_purpose = "skip stages, and those that read from them, until doit ignore --undo"
    doc_usage = "[--undo] STAGE [STAGE ...]"
    cmd_options = (_UNDO,)

    def _execute(self, pos_args: list[str], undo: bool) -> None:
        if not self.is_of_stages:
            if undo:
                refuse("--undo: is about stages. Use: doit forget TASK")
            super()._execute(pos_args)
            return
        if not pos_args:
            refuse("expected a stage. Use: doit ignore STAGE")
        nodes = Selection(self).select(pos_args)
        with self.alone():
            for node in nodes:
                self.journal.set(node.task, "ignore:", None if undo else "1")
                terminal.show(
                    f"{node.task}: {'no longer ignored' if undo else 'ignored until doit ignore --undo ' + node.task}"
                )


class StageDumpDB(StageVerb):
    """`doit dumpdb`: the journal as JSON."""

    name = "dumpdb"
    doc_purpose = "print the record of each stage, as JSON"

    def execute(self, params: Any, args: list[str]) -> int:
        """Print the journal; without stages, doit's own output."""
        try:
            return super().execute(params, args)
        except InvalidDodoFile:
            DumpDB().execute(params, args)
            return 0

    def _execute(self, pos_args: list[str]) -> None:
        if not self.is_of_stages:
            DumpDB().execute({"dep_file": self.dep_manager.name}, pos_args)
            return
        nodes = Selection(self).select(pos_args)
        json.dump({node.task: self.journal.record(node.task) for node in nodes}, sys.stdout, indent=2)
        terminal.show("")


class StageResetDep(Verb, ResetDep):  # type: ignore[misc]
    """`doit reset-dep`, refused for stages."""

    name = "reset-dep"
    doc_purpose = "not for stages: their freshness follows from the record of the last run"

    def _execute(self, pos_args: list[str] | None = None) -> None:
        if self.is_of_stages:
            refuse(
                "reset-dep: not supported: the freshness of a stage follows from the record of its last run. "
                "Use: doit plan"
            )
        super()._execute(pos_args)


class StageStrace(Verb, Strace):  # type: ignore[misc]
    """`doit strace`, refused for stages."""

    name = "strace"

    def _execute(self, show_all: bool) -> int:
        if self.is_of_stages:
            refuse("strace: doit cannot trace the processes of stages. What one reads and writes: doit info STAGE")
        return int(super()._execute(show_all) or 0)


class StageTabCompletion(Verb, TabCompletion):  # type: ignore[misc]
    """`doit tabcompletion`."""

    name = "tabcompletion"
    doc_purpose = "print a script for the shell's completion of commands and stages"


_print_doits_usage = Help.print_usage


def _print_usage(own: Any, cmds: dict[str, Any]) -> None:
    """Print the overview of stages, or that of doit for another graph."""
    if not loads_stages(own.loader):
        _print_doits_usage(own, cmds)
        return
    from mlxflow.tasks.help_text import usage

    try:
        terminal.show(*usage(cmds))
        sys.stdout.flush()
    except BrokenPipeError:
        if isinstance(own, Verb):  # it has an exit code for that
            raise
        terminal.discard_unwritable()


# `doit --help` uses doit's own class, which no plugin can replace; it loads the plugins, and so this module, before it
# prints.
Help.print_usage = _print_usage


class StageHelp(Verb, Help):  # type: ignore[misc]
    """`doit help`."""

    name = "help"
    doc_purpose = "show this overview, or the options of a command"
    doc_usage = "[COMMAND]"
    writes_to = "standard output"

    def _execute(self, pos_args: list[str]) -> bool:
        is_found = bool(super()._execute(pos_args))
        if not is_found and self.is_of_stages:
            refuse(unknown_name_message(pos_args[0], [*self._names(), *self.cmds], "stage or command"))
        return is_found
