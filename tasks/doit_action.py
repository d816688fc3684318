"""The doit action of a stage: observe its inputs, run its process, record its outputs."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from doit.action import BaseAction
from doit.exceptions import BaseFail, TaskError, TaskFailed
from doit.globals import Globals

from mlxflow.messages import terminal
from mlxflow.messages.errors import StageError, UserError
from mlxflow.messages.os_errors import cause_message
from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.stage_store import StageStore
from mlxflow.workflow.journal import VALUES
from mlxflow.workflow.outputs import observe_outputs
from mlxflow.workflow.records import FORGOTTEN
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import observe_inputs, observe_settings

#: The exit code of a stage that failed because of a user's mistake.
_USER_MISTAKE = 2

#: Held by the stage of this process that uses the device.
_own_turns = threading.Lock()


class _Ran(NamedTuple):
    """A finished process of a stage: its inputs and result."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    exit_code: int
    seconds: float


class StageAction(BaseAction):  # type: ignore[misc]  # doit has no types
    """Runs one stage in its own process.

    The record of the last run is removed first, so that an interrupted run is never taken for a finished one. Settings
    and inputs are observed before the process starts and passed to it; it fails if it finds others.

    Args:
        node: the stage.
        cache: digests by path.
        known: the names of all stages of the workflow, for the lock file.
        store: where artifacts are shared, if the workflow has a store.

    Attributes:
        is_taken: whether the artifact was taken from the store.
        is_untouched: whether a failed run left every file of the artifact unchanged.
    """

    def __init__(self, node: Node, cache: DigestCache, known: set[str], store: StageStore) -> None:
        self.node = node
        self.store = store
        self.is_taken = False
        self.cache = cache
        self.known = known
        self.is_untouched = True
        self.task: Any = None
        self.out = ""
        self.err = ""
        self.result = None
        self.values: dict[str, Any] = {}

    def __str__(self) -> str:
        return " ".join(self.node.command)

    def execute(self, out: object = None, err: object = None) -> BaseFail | None:
        """Run the stage; doit saves `values` after a success."""
        before = self._stamps()
        try:
            Globals.dep_manager.backend.check_writable()
            is_forgotten = FORGOTTEN in (Globals.dep_manager.backend.get(self.node.task, VALUES) or {})
            Globals.dep_manager.remove(self.node.task)
            self.store.flush()
            if not is_forgotten and (taken := self.store.take(self.node)):
                self._keep(taken)
                return None
            ran = self._run()
        except UserError as error:
            return self._fail(TaskError, str(error))
        except StageError as error:
            return self._fail(TaskFailed, str(error))
        if isinstance(ran, BaseFail):
            return ran
        self.is_untouched = before == self._stamps()
        if code := ran.exit_code:
            message = "" if 0 < code <= _USER_MISTAKE else f"{self.node.task}: its process ended with {_word(code)}"
            return self._fail(TaskError if code == _USER_MISTAKE else TaskFailed, message)
        try:
            outputs = observe_outputs(self.node, self.cache)
        except OSError as error:
            return self._fail(TaskFailed, f"{self.node.task}: an output: {cause_message(error, self.node.folder)}")
        except ValueError as error:
            return self._fail(TaskFailed, f"{self.node.task}: an output is damaged ({error})")
        self.cache.save()
        self._record(ran, outputs)
        return None

    def _run(self) -> "_Ran | BaseFail":
        """Run the process, holding the device if it needs it; inputs are observed when the device is held."""
        from mlxflow.tasks.stage_process import run_process

        node = self.node
        log = layout.log_file(node.root, node.task)
        with self._turn() if node.uses_device else nullcontext():
            try:
                inputs = observe_inputs(node, self.cache)
            except OSError as error:
                return self._fail(TaskFailed, f"{node.task}: an input: {cause_message(error, node.task)}")
            except ValueError as error:
                return self._fail(TaskFailed, f"{node.task}: an input is damaged ({error})")
            settings = observe_settings(node)
            begin = time.perf_counter()
            code = run_process(node.command, log, node.handover(settings, inputs))
            return _Ran(settings, inputs, code, time.perf_counter() - begin)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the device among the stages of this doit and, by `compute_device.turn`, among other processes."""
        from mlxflow.device.compute_device import turn

        node = self.node
        with _own_turns, turn(node.task, node.root, node.device, measures=node.bound_device is not None):
            yield

    def _stamps(self) -> list[tuple[int, ...] | None]:
        """Return inode, size and time of the artifact's files, to detect replaced ones."""
        return [_stamp(self.node.path(name)) for name in (*self.node.outputs, *self.node.copies)]

    def _keep(self, taken: dict[str, Any]) -> None:
        """Keep the record of an artifact that was taken from the store."""
        self.is_taken = True
        self.is_untouched = False
        self.values = taken
        self._write_lock()

    def _record(self, ran: "_Ran", outputs: dict[str, list[Any]]) -> None:
        from mlxflow.tasks import lockfile

        self.values = {
            "settings": ran.settings,
            "inputs": ran.inputs,
            "outputs": outputs,
            "seconds": round(ran.seconds, 3),
            **self._computed_by(),
            "commit": lockfile.source_commit(self.node.root),
        }
        self._write_lock()
        self.store.offer(self.node, self.values)

    def _write_lock(self) -> None:
        from mlxflow.tasks import lockfile

        if line := lockfile.update(self.node.root / layout.LOCKFILE, self.node, self.values, self.known):
            terminal.say(line)

    def _computed_by(self) -> dict[str, Any]:
        """Return the device of the stage's report and, for a CPU, the number of threads."""
        from mlxflow.messages.errors import ArtifactError
        from mlxflow.tasks.report_device import ReportDevice, read_device

        try:
            device = read_device(self.node.root / self.node.folder / layout.REPORT)
        except ArtifactError:
            device = ReportDevice("unknown", None)
        return device.record()

    def _fail(self, kind: type[BaseFail], message: str) -> BaseFail:
        self.cache.save()
        if message:
            terminal.say(*message.split("\n"))
        return kind(message)


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _word(code: int) -> str:
    import signal

    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
