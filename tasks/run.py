"""The command `doit run` with a lock on the artifacts and termination of running stages."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from doit.cmd_run import Run

from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.os_errors import cause_message
from mlxflow.storage import layout
from mlxflow.tasks.adoption import Adoption
from mlxflow.tasks.doit_backend import Journal
from mlxflow.tasks.selection import Selection, refuse, unknown_name_message
from mlxflow.tasks.verb import Verb

_NO_WAIT = {
    "name": "no_wait",
    "long": "no-wait",
    "type": bool,
    "default": False,
    "help": "fail if another doit uses the same artifacts, instead of waiting for it",
}


class StageRun(Verb, Run):  # type: ignore[misc]  # doit has no types
    """`doit run`: one at a time for an artifacts folder; stages are terminated when it ends.

    Graphs without stages run as in doit.
    """

    name = "run"
    doc_purpose = "build stale stages, as doit without a command does"
    doc_usage = "[STAGE ...] [workflow=FILE]"
    cmd_options = (*Run.cmd_options, _NO_WAIT)

    def execute(self, params: Any, args: list[str]) -> int:
        """Store whether to wait, which doit's signature has no parameter for."""
        self._no_wait = bool(params.get("no_wait"))
        return super().execute(params, args)

    def show_help(self) -> None:
        """Print the overview: `doit -h` asks for it."""
        from doit.doit_cmd import DoitMain

        from mlxflow.tasks.help_text import usage

        terminal.show(*usage(DoitMain().get_cmds().to_dict()))

    def _check_names(self) -> None:
        """Refuse an unknown stage before anything is written; doit would notice it later, under the lock."""
        known = {name for task in self.task_list for name in (task.name, *task.targets)}
        for name in self.sel_tasks or ():
            if not name.startswith("-") and "*" not in name and name not in known:
                refuse(unknown_name_message(name, self._names()))

    def _execute(  # type: ignore[no-untyped-def]  # doit passes options by the names in this signature
        self,
        outfile,
        verbosity=None,
        always=False,
        continue_=False,
        reporter="console",
        num_process=0,
        par_type="process",
        single=False,
        auto_delayed_regex=False,
        force_verbosity=False,
        failure_verbosity=0,
        pdb=False,
    ) -> int:
        def run(par_type: str) -> int:
            # doit's default is the stream when it was imported: None if that was closed, and not the escaping one
            out = sys.stdout if outfile in (None, sys.__stdout__) else outfile
            options = (auto_delayed_regex, force_verbosity, failure_verbosity, pdb)
            return int(
                super(StageRun, self)._execute(
                    out,
                    verbosity,
                    always,
                    continue_,
                    reporter,
                    num_process,
                    par_type,
                    single,
                    *options,
                )
            )

        if not self.is_of_stages:
            return run(par_type)
        if num_process < 0:  # doit would run nothing
            refuse(f"-n {num_process}: expected a number of processes. Use one such as 2.")
        self._check_names()
        Selection(self).store.takes = not always  # "execute even if up to date" asks for a build
        return self._run_alone(lambda: run("thread"), is_single=single)  # threads suffice: stages are processes

    def _run_alone(self, run: Callable[[], int], *, is_single: bool) -> int:
        """Run the stages under the lock on the artifacts, and map errors to exit codes."""
        from mlxflow.messages.errors import StageError, UserError
        from mlxflow.storage.atomic_folders import make_link_target
        from mlxflow.storage.locks import LockedError, hold

        graph = Selection(self)
        adoption = Adoption(graph.nodes, graph.cache)
        journal = graph.journal
        artifacts = Path(journal.name).parents[1]
        waiting = "another doit (process {holder}) is using these artifacts"
        waiting += "; doit --no-wait does not wait for it" if not self._no_wait else ""
        try:
            make_link_target(artifacts)
            lock = hold(Path(journal.name).with_name(layout.LOCK), waiting, wait=not self._no_wait)
            with ended_cleanly(), lock as journal.unwritable:
                journal.load()  # the other doit may have finished stages
                if not journal.unwritable:  # otherwise nothing may be written
                    _tidy(journal, adoption, artifacts)
                if is_single and (stale := self._stale_upstream()):
                    terminal.say(*stale)
                    return 1
                code = run()
                graph.store.flush()
            _say_tracked(artifacts)
            return code
        except LockedError as error:
            terminal.say_error(error)
            return 1
        except (StageError, UserError) as error:
            terminal.say_error(error)
            return error.exit_code
        except BrokenPipeError:  # handled by `Verb`
            raise
        except OSError as error:  # doit's own state cannot be written
            terminal.say_last(cause_message(error, Path(journal.name).parent))
            return 1
        except KeyboardInterrupt:
            terminal.say_last("interrupted: finished stages are kept, the artifact of the running one is unchanged")
            return 128 + signal.SIGINT

    def _stale_upstream(self) -> list[str]:
        """Return a line for each selected stage that reads from a stale one."""
        from mlxflow.tasks.selection import with_upstream
        from mlxflow.workflow.staleness import find_stale

        graph = Selection(self)
        lines = []
        for name in self.sel_tasks or ():
            upstream = with_upstream(graph.nodes, [name])
            selected = {node.task for node in upstream if node.task == name or node.task.partition(":")[0] == name}
            planned = find_stale([node for node in upstream if node.task not in selected], graph.record, graph.cache)
            lines += [
                f"{name}: reads from {one.node.task}, which is stale ({'; '.join(one.reasons)}). {advise_build(name)}"
                for one in planned
            ]
        return lines


def _say_tracked(artifacts: Path) -> None:
    """Print what was said of the stages that are reported to trackers, which may have ended before that."""
    folder = artifacts / layout.STATE / layout.TRACKING
    if any(folder.glob("*.json")) or any(folder.glob("*.said")):
        from mlxflow.workflow.stage_tracking import closing_lines_of

        terminal.say(*closing_lines_of(artifacts.parent))


def _tidy(journal: Journal, adoption: Adoption, artifacts: Path) -> None:
    """Repair the state and remove leftovers of earlier runs; call it under the lock."""
    journal.repair()
    journal.keeps_adopted = True
    if line := adoption.settle_merge():
        terminal.say(line)
    _remove_left_behind(artifacts)


def _remove_left_behind(artifacts: Path) -> None:
    """Remove files of interrupted stages; no other process uses them while the lock is held."""
    from mlxflow.storage.atomic_folders import partial_folders, remove_folder
    from mlxflow.storage.temporary_files import remove_orphans, remove_orphans_below

    for folder in (*partial_folders(artifacts), *artifacts.glob(f"{layout.STATE}/{layout.REPRODUCTION_PREFIX}*")):
        remove_folder(folder)
    remove_orphans(artifacts.parent, f".{layout.LOCKFILE}.")
    remove_orphans(artifacts, ".")
    remove_orphans_below(artifacts / layout.STATE)


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Terminate running stages if doit ends by SIGTERM, Ctrl-C or an error."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException:
        from mlxflow.tasks.stage_process import end_all

        end_all()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
