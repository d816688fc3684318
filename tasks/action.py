"""What doit executes for a stage: its process, between a look at its inputs and a look at its outputs."""

import sys
import time
from typing import Any

from doit.action import BaseAction
from doit.exceptions import BaseFail, TaskError, TaskFailed
from doit.globals import Globals

from mlxflow.identity import DigestCache
from tasks.freshness import observe_inputs, observe_outputs, observe_settings
from tasks.node import Node

#: The exit code of a stage that failed over something the user wrote.
_USER_MISTAKE = 2


class StageAction(BaseAction):  # type: ignore[misc]  # doit has no types
    """Runs one stage in its own process.

    The record of its last run is dropped first, so that a run which is cut off is never trusted. Inputs are looked at
    before the process starts: one that is edited meanwhile makes the stage stale next time.
    """

    def __init__(self, node: Node, cache: DigestCache) -> None:
        self.node = node
        self.cache = cache
        self.task: Any = None
        self.out = ""
        self.err = ""
        self.result = None
        self.values: dict[str, Any] = {}

    def __str__(self) -> str:
        return " ".join(self.node.command)

    def execute(self, out: object = None, err: object = None) -> BaseFail | None:
        """Run the stage; doit saves `values` when all went well."""
        from tasks.process import run_process

        node = self.node
        Globals.dep_manager.remove(node.task)
        try:
            inputs = observe_inputs(node, self.cache)
        except (OSError, ValueError) as error:
            return self._fail(TaskFailed, f"{node.task}: an input is missing or damaged ({error})")
        log = node.root / "artifacts" / "logs" / f"{node.task.replace(':', '-')}.log"
        begin = time.perf_counter()
        code = run_process(node.command, log)
        seconds = time.perf_counter() - begin
        if code:
            said = "" if 0 < code <= _USER_MISTAKE else f"{node.task}: the stage's process ended with {_word(code)}"
            return self._fail(TaskError if code == _USER_MISTAKE else TaskFailed, said)
        try:
            outputs = observe_outputs(node, self.cache)
        except (OSError, ValueError) as error:
            return self._fail(TaskFailed, f"{node.task}: an output is missing or damaged ({error})")
        self.cache.save()
        self.values = {
            "settings": observe_settings(node),
            "inputs": inputs,
            "outputs": outputs,
            "seconds": round(seconds, 3),
        }
        return None

    def _fail(self, kind: type[BaseFail], message: str) -> BaseFail:
        self.cache.save()
        if message:
            print(message, file=sys.stderr)
        return kind(message)


def _word(code: int) -> str:
    import signal

    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
