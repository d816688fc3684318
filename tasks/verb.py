"""The base of all doit commands: a wrong call is one line and exit code 2, and a closed pipe is no error.

doit finds commands by entry points, for every project in an environment. On a graph without stages each command behaves
as doit's own.
"""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.cmdparse import CmdParseError
from doit.exceptions import InvalidCommand, InvalidDodoFile

from mlxflow.messages import terminal
from mlxflow.messages.errors import MlxflowError
from mlxflow.messages.os_errors import cause_message, naming
from mlxflow.storage import layout
from mlxflow.tasks.doit_backend import BACKEND, Journal
from mlxflow.tasks.selection import refuse, unknown_name_message

#: Options of doit's state, which stages do not support.
_FIXED_OPTIONS = {"backend": "--backend", "dep_file": "--db-file", "check_file_uptodate": "--check_file_uptodate"}

#: The import in a dodo.py before `tasks` became part of `mlxflow`.
_OLD_IMPORT = "from tasks.dodo import"
_NEW_IMPORT = "Write: from mlxflow.tasks.dodo import DOIT_CONFIG, task_stages"

_CLOSED_PIPE = 128 + signal.SIGPIPE

#: Allocations between garbage collections; a large graph makes fewer, which live as long as the process.
_COLLECT_AFTER = 1_000_000


def loads_stages(loader: Any) -> bool:
    """Return whether the graph of a doit loader consists of stages; the graph is loaded if it is not yet.

    Args:
        loader: a doit loader with a namespace.
    """
    if loader.namespace is None:  # a wrong argument was found before the graph was loaded
        try:
            loader.setup({option["name"]: option["default"] for option in loader.cmd_options})
        except InvalidDodoFile:
            return False
    return bool((loader.namespace or {}).get("DOIT_CONFIG", {}).get("backend") == BACKEND)


class Verb:
    """A mixin for doit's commands; inherit it before one.

    Attributes:
        writes_to: the name in messages of file errors that have none.
    """

    name: str
    writes_to = "doit"
    loader: Any
    dep_manager: Any
    task_list: Any
    outstream: Any

    _params: Any = None

    def parse_execute(self, in_args: list[str]) -> int:
        """Execute the command; a closed output pipe, as in `doit list | head -1`, ends it quietly."""
        if _open_closed_streams():
            self.outstream = sys.stdout
        try:
            if in_args in (["-h"], ["--help"]) and self.is_of_stages:
                self.show_help()
                return 0
            with _rare_collections():
                code = super().parse_execute(in_args)  # type: ignore[misc]
            with naming("standard output"):
                sys.stdout.flush()
        except BrokenPipeError:
            terminal.discard_unwritable()
            return _CLOSED_PIPE
        except OSError as error:
            if not self.is_of_stages:
                raise
            terminal.discard_unwritable()
            refuse(cause_message(error, self.writes_to), 1)
        except CmdParseError as error:
            line = str(error).partition(" (parsing options:")[0]  # the rest lists every option
            if not self.is_of_stages:
                raise CmdParseError(line) from error
            refuse(f"{line.rstrip('.')}. See: doit help {self.name}")
        return int(code or 0)

    def execute(self, params: Any, args: list[str]) -> int:
        """Execute the command; with stages, unknown names and other wrong arguments are one line."""
        self._params = params
        try:
            return int(super().execute(params, args) or 0)  # type: ignore[misc]
        except InvalidCommand as error:
            if not self.is_of_stages:
                raise
            unknown = [name for name in args if "*" not in name and name not in self._names()]
            refuse("\n".join(unknown_name_message(name, self._names()) for name in unknown) or str(error))
        except MlxflowError as error:
            refuse(str(error), error.exit_code)
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:
            _refuse_old_import(error)
            raise
        except OSError as error:
            if not self.is_of_stages:
                raise
            refuse(cause_message(error, self.writes_to), 1)

    def show_help(self) -> None:
        """Print the options of this command."""
        terminal.write(f"{self.help()}\n")  # type: ignore[attr-defined]

    def get_checker_cls(self, check_file_uptodate: object) -> Any:
        """Return doit's checker class; refuse options that stages do not support before anything is opened.

        doit calls this first once it has the graph: from here on doit's own output is escaped.
        """
        if self.is_of_stages:
            terminal.guard()
            self.outstream = sys.stdout
        written: set[str] = getattr(self._params, "_non_default_keys", set())
        for name in sorted(written & _FIXED_OPTIONS.keys() if self.is_of_stages else ()):
            refuse(f"{_FIXED_OPTIONS[name]}: not supported for stages, which have their own journal. Leave it out.")
        return super().get_checker_cls(check_file_uptodate)  # type: ignore[misc]

    @property
    def is_of_stages(self) -> bool:
        """Whether the graph consists of stages."""
        return loads_stages(self.loader)

    @property
    def journal(self) -> Journal:
        """The journal of the stages."""
        journal: Journal = self.dep_manager.backend
        return journal

    def _names(self) -> list[str]:
        return [task.name for task in self.task_list]

    @contextmanager
    def alone(self, *, makes: bool = False, reads: bool = False) -> Iterator[None]:
        """Hold the lock on the artifacts until the block ends; waits for other doit processes.

        Args:
            makes: the artifacts folder may have to be created.
            reads: nothing is changed, so that an unwritable lock file is accepted.

        Raises:
            UserError: the lock file cannot be created, and something is changed.
        """
        from mlxflow.storage.atomic_folders import make_link_target
        from mlxflow.storage.locks import hold

        state = Path(self.journal.name).parent
        if makes:
            make_link_target(state.parent)
        waiting = "another doit (process {holder}) is using these artifacts"
        lock = hold(state / layout.LOCK, waiting, wait=True, needed=not reads)
        with lock if makes or state.parent.is_dir() else nullcontext() as self.journal.unwritable:
            self.journal.load()  # another doit may have finished stages
            if not self.journal.unwritable:
                self.journal.repair()
            yield


class StageVerb(Verb, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """A command that doit does not have."""


def _refuse_old_import(error: ModuleNotFoundError) -> None:
    """Exit with one line if the failed import is the old one of a dodo.py."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if error.name in ("tasks", "tasks.dodo") and _OLD_IMPORT in line:
        refuse(f"dodo.py: {_OLD_IMPORT}: expected mlxflow.tasks.dodo. {_NEW_IMPORT}")


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage rarely: with over a thousand stages that saves a sixth of the time of a no-op."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.freeze()  # moves them back as already examined objects; else the next allocation starts a full collection
        gc.unfreeze()
        gc.set_threshold(*before)


def _open_closed_streams() -> bool:
    """Open closed standard streams, as after `>&-`, so that no other file gets their descriptors.

    Returns:
        whether a stream was closed.
    """
    was_closed = False
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            was_closed = True
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    return was_closed
