"""doit's own `run` with locks and clean ends, and the verbs that ask about artifacts or move them."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from doit.cmd_base import DoitCmdBase
from doit.cmd_run import Run

from mlxflow.identity import DigestCache
from tasks.node import Node
from tasks.state import Journal

_NO_WAIT = {
    "name": "no_wait",
    "long": "no-wait",
    "type": bool,
    "default": False,
    "help": "fail when another doit is at work on the same artifacts, instead of waiting for it",
}

_EXIT_CODE = {
    "name": "exit_code",
    "long": "exit-code",
    "type": bool,
    "default": False,
    "help": "exit with 1 when something would run",
}


class StageRun(Run):  # type: ignore[misc]  # doit has no types
    """`doit run`: one at a time on an artifacts folder, and nothing goes on after it ends.

    Graphs that are not of stages run as doit runs them.
    """

    name = "run"
    cmd_options = (*Run.cmd_options, _NO_WAIT)

    def execute(self, params: Any, args: list[str]) -> int:
        """Remember whether to wait, which doit's own signature has no place for."""
        self._no_wait = bool(params.get("no_wait"))
        return int(super().execute(params, args) or 0)

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
            options = (auto_delayed_regex, force_verbosity, failure_verbosity, pdb)
            return int(
                super(StageRun, self)._execute(
                    outfile, verbosity, always, continue_, reporter, num_process, par_type, single, *options
                )
            )

        journal = self.dep_manager.backend
        if not isinstance(journal, Journal):
            return run(par_type)
        from tasks.locking import LockedError, hold

        waiting = "another doit (process {holder}) is at work on these artifacts"
        waiting += "; doit run --no-wait does not wait for it" if not self._no_wait else ""
        try:
            with _ended_cleanly(), hold(Path(journal.name).with_name("lock"), waiting, wait=not self._no_wait):
                journal.load()  # the other doit may have finished stages
                if single and (stale := self._stale_upstream()):
                    print(*stale, sep="\n", file=sys.stderr)
                    return 1
                return run("thread")  # stages are processes already
        except LockedError as error:
            print(error, file=sys.stderr)
            return 1
        except OSError as error:  # doit's own state cannot be written
            where = error.filename or Path(journal.name).parent
            print(f"{where}: {error.strerror}. Make room, or let it be written.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: finished stages are kept, the one that ran is as it was before", file=sys.stderr)
            return 128 + signal.SIGINT

    def _stale_upstream(self) -> list[str]:
        """Return a line for each selected stage that reads from a stale one."""
        from tasks.planning import plan, with_upstream

        graph = Graph(self)
        lines = []
        for name in self.sel_tasks or ():
            upstream = with_upstream(graph.nodes, [name])
            selected = {node.task for node in upstream if node.task == name or node.task.partition(":")[0] == name}
            planned = plan([node for node in upstream if node.task not in selected], graph.record, graph.cache)
            lines += [
                f"{name}: reads from {one.node.task}, which is stale ({'; '.join(one.reasons)}). Run: doit {name}"
                for one in planned
            ]
        return lines


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """End the stages that run when doit ends by SIGTERM, Ctrl-C or an error."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except BaseException:
        from tasks.process import end_all

        end_all()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class Graph:
    """The stages that a command was given, and what is known of them.

    Attributes:
        nodes: every stage, each after the ones it reads from.
        cache: digests by path.
    """

    def __init__(self, command: DoitCmdBase) -> None:
        metas = [task.meta for task in command.task_list if task.meta and "node" in task.meta]
        self.nodes: list[Node] = [meta["node"] for meta in metas]
        self.cache: DigestCache = metas[0]["cache"]
        self.journal: Journal = command.dep_manager.backend

    def record(self, task: str) -> dict[str, Any]:
        """Return what a stage's last run left, empty where there is no record."""
        return self.journal.get(task, "_values_:") or {}

    def select(self, names: list[str]) -> list[Node]:
        """Return the stages of the given names, all of them where there are none.

        Raises:
            SystemExit: a name is no stage; said, with exit code 2.
        """
        for name in names:
            if not any(node.task == name or node.task.startswith(f"{name}:") for node in self.nodes):
                known = ", ".join(node.task for node in self.nodes)
                _refuse(f"{name}: no such stage. Known: {known}.")
        return [node for node in self.nodes if not names or node.task in names or node.task.partition(":")[0] in names]

    def one(self, names: list[str], usage: str) -> Node:
        """Return the one stage of the given name.

        Raises:
            SystemExit: not one name was given, or it is no stage or several; said, with exit code 2.
        """
        if len(names) != 1:
            _refuse(f"expected one stage. Use: {usage}")
        chosen = self.select(names)
        if len(chosen) > 1:
            _refuse(f"{names[0]}: has variants. Name one of {', '.join(node.task for node in chosen)}.")
        return chosen[0]

    def fresh_record(self, node: Node) -> dict[str, Any]:
        """Return the record of a stage whose artifact is what its last run left.

        Raises:
            SystemExit: there is none, or the artifact is damaged; said, with exit code 1.
        """
        from tasks.freshness import damaged_outputs

        record = self.record(node.task)
        if not record:
            _refuse(f"{node.task}: never built here. Run: doit {node.task}", 1)
        if damage := list(damaged_outputs(node, record, self.cache, again=True)):
            _refuse("\n".join([*damage, f"{node.task}: is not what its run left. Run: doit {node.task}"]), 1)
        return record


def _refuse(line: str, code: int = 2) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(code)


class Plan(DoitCmdBase):  # type: ignore[misc]
    """`doit plan`."""

    name = "plan"
    doc_purpose = "what would run, why, and the seconds it took last time"
    doc_usage = "[STAGE ...]"
    cmd_options = (_EXIT_CODE,)

    def _execute(self, exit_code: bool, pos_args: list[str]) -> int:
        from tasks.planning import plan, with_upstream

        graph = Graph(self)
        nodes = with_upstream(graph.nodes, [node.task for node in graph.select(pos_args)])
        planned = plan(nodes, graph.record, graph.cache)
        for node, reasons, seconds in planned:
            took = f"  ({seconds:,.1f} s last time)" if seconds is not None else ""
            print(f"{node.task}: {'; '.join(reasons)}{took}")
        known = [one.seconds for one in planned if one.seconds is not None]
        if not planned:
            print(f"nothing to do: {len(nodes)} stages are fresh")
        else:
            took = f"; {len(known)} of them took {sum(known):,.1f} s last time" if known else ""
            print(f"{len(planned)} of {len(nodes)} stages will run{took}")
        return int(bool(planned) and exit_code)


class Verify(DoitCmdBase):  # type: ignore[misc]
    """`doit verify`."""

    name = "verify"
    doc_purpose = "read every artifact again, whatever the file system says, and exit with 1 on damage"
    doc_usage = "[STAGE ...]"

    def _execute(self, pos_args: list[str]) -> int:
        from tasks.freshness import damaged_outputs

        graph = Graph(self)
        damage: list[str] = []
        built = [node for node in graph.select(pos_args) if graph.record(node.task)]
        for node in built:
            damage += damaged_outputs(node, graph.record(node.task), graph.cache, again=True)
        for line in damage:
            print(line)
        files = sum(len(node.outputs) for node in built)
        print(f"{files} files of {len(built)} stages read, {len(damage)} damaged")
        return int(bool(damage))


class CacheKey(DoitCmdBase):  # type: ignore[misc]
    """`doit cache-key`."""

    name = "cache-key"
    doc_purpose = "a key for a CI cache that changes exactly when a stage's inputs do"
    doc_usage = "STAGE"

    def _execute(self, pos_args: list[str]) -> int:
        from tasks.keys import cache_key

        graph = Graph(self)
        node = graph.one(pos_args, "doit cache-key STAGE")
        print(f"{node.task.replace(':', '-')}-{cache_key(node, graph.nodes, graph.cache)}")
        return 0


class Pack(DoitCmdBase):  # type: ignore[misc]
    """`doit pack`."""

    name = "pack"
    doc_purpose = "write one stage's artifact with its record into a file"
    doc_usage = "STAGE FILE"

    def _execute(self, pos_args: list[str]) -> int:
        from tasks.archive import pack

        graph = Graph(self)
        if len(pos_args) != 2:
            _refuse("expected a stage and a file. Use: doit pack STAGE FILE")
        node = graph.one(pos_args[:1], "doit pack STAGE FILE")
        record = graph.fresh_record(node)
        try:
            pack(node, record, Path(pos_args[1]))
        except OSError as error:
            _refuse(f"{pos_args[1]}: cannot be written ({error.strerror}). Name another file.")
        print(f"{node.task}: {len(node.outputs)} files packed into {pos_args[1]}")
        return 0


class Unpack(DoitCmdBase):  # type: ignore[misc]
    """`doit unpack`."""

    name = "unpack"
    doc_purpose = "put a packed artifact into its place, after checking every byte of it"
    doc_usage = "FILE"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.errors import MlxflowError
        from tasks.archive import unpack

        graph = Graph(self)
        if len(pos_args) != 1:
            _refuse("expected one file. Use: doit unpack FILE")
        try:
            node, values = unpack(Path(pos_args[0]), {node.task: node for node in graph.nodes})
        except MlxflowError as error:
            _refuse(str(error), error.exit_code)
        graph.journal.set(node.task, "_values_:", values)
        graph.journal.set(node.task, "deps:", [])
        print(f"{node.task}: {len(node.outputs)} files unpacked into {node.folder}")
        return 0


class Reproduce(DoitCmdBase):  # type: ignore[misc]
    """`doit reproduce`."""

    name = "reproduce"
    doc_purpose = "build a stage again in a scratch folder and say whether every tensor is equal"
    doc_usage = "STAGE"

    def _execute(self, pos_args: list[str]) -> int:
        from tasks.reproduction import reproduce

        graph = Graph(self)
        node = graph.one(pos_args, "doit reproduce STAGE")
        if node.bound_device is not None:
            _refuse(f"{node.task}: measures the machine; there is nothing to reproduce.")
        graph.fresh_record(node)
        with _ended_cleanly():
            return reproduce(node)
