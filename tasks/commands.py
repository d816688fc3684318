"""The commands plan, verify, cache-key, pack, unpack and reproduce."""

from collections.abc import Sequence
from pathlib import Path

from mlxflow.messages import terminal
from mlxflow.messages.os_errors import advise_on
from mlxflow.storage import layout
from mlxflow.tasks.selection import Selection, refuse, with_upstream
from mlxflow.tasks.stage_store import FROM_THE_STORE
from mlxflow.tasks.verb import StageVerb
from mlxflow.workflow.staleness import StaleStage

_EXIT_CODE = {
    "name": "exit_code",
    "long": "exit-code",
    "type": bool,
    "default": False,
    "help": "exit with 1 when something would run",
}


class Plan(StageVerb):
    """`doit plan`."""

    name = "plan"
    doc_purpose = "print what would run, why, and how long it took last time"
    doc_usage = "[STAGE ...]"
    cmd_options = (_EXIT_CODE,)

    def _execute(self, exit_code: bool, pos_args: list[str]) -> int:
        from mlxflow.tasks.leftovers import find_leftovers
        from mlxflow.training import length
        from mlxflow.workflow.staleness import find_stale

        graph = Selection(self)
        root = graph.nodes[0].root
        nodes = with_upstream(graph.nodes, [node.task for node in graph.select(pos_args)])
        planned = find_stale(nodes, graph.record, graph.cache, graph.is_ignored)
        taken = graph.store.foresee(planned)
        made = {one.node.folder for one in planned}
        for stale in planned:
            config, node = stale.node.settings.get("config", {}), stale.node
            notes = [length.describe_stage(config, node.inputs, root, unbuilt=made), node.ranks, _last_time(stale)]
            more = FROM_THE_STORE if node.task in taken else "; ".join(filter(None, notes))
            terminal.show(f"{node.task}: {'; '.join(stale.reasons)}" + (f"  ({more})" if more else ""))
        terminal.show(_plan_summary(planned, taken, len(nodes)))
        for node in (node for node in nodes if graph.is_ignored(node.task)):
            terminal.show(
                f"{node.task}: ignored, and so are those that read from it, until doit ignore --undo {node.task}"
            )
        for leftover in find_leftovers(root, graph.nodes):
            terminal.show(leftover)
        return int(bool(planned) and exit_code)


def _last_time(stale: StaleStage) -> str:
    return f"{stale.seconds:,.1f} s last time" if stale.seconds is not None else ""


def _plan_summary(planned: Sequence[StaleStage], taken: set[str], num_stages: int) -> str:
    """Return the last line of a plan.

    Args:
        planned: the stages that will run.
        taken: those of them whose artifacts will be taken from the store.
        num_stages: how many were examined.
    """
    if not planned:
        return f"nothing to do: {num_stages} stages are fresh"
    known = [one.seconds for one in planned if one.seconds is not None and one.node.task not in taken]
    got = f", {len(taken)} of them {FROM_THE_STORE}" if taken else ""
    took = f"; {len(known)} of them took {sum(known):,.1f} s last time" if known else ""
    return f"{len(planned)} of {num_stages} stages will run{got}{took}"


class Verify(StageVerb):
    """`doit verify`."""

    name = "verify"
    doc_purpose = "read every file of the artifacts again, and exit with 1 on damage"
    doc_usage = "[STAGE ...]"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.device.cpu_backend import thread_count
        from mlxflow.tasks.reproduction import other_threads_message
        from mlxflow.workflow.outputs import damaged_outputs
        from mlxflow.workflow.records import is_complete

        graph = Selection(self)
        damage: list[str] = []
        built = [node for node in graph.select(pos_args) if is_complete(graph.record(node.task))]
        for node in built:
            damage += damaged_outputs(node, graph.record(node.task), graph.cache, again=True)
        for line in damage:
            terminal.show(line)
        for node in built:
            threads = node.threads or thread_count()
            if line := other_threads_message(node.task, graph.record(node.task), threads, "here it would be"):
                terminal.show(line)
        files = sum(len(graph.record(node.task)["outputs"]) for node in built)
        terminal.show(f"{files} files of {len(built)} stages read, {len(damage)} damaged")
        return int(bool(damage))


class CacheKey(StageVerb):
    """`doit cache-key`."""

    name = "cache-key"
    doc_purpose = "print a key for a CI cache that changes exactly when the inputs of a stage do"
    doc_usage = "STAGE"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.tasks.cache_key import named_key

        graph = Selection(self)
        node = graph.one(pos_args, "doit cache-key STAGE")
        terminal.show(named_key(node, graph.nodes, graph.cache))
        return 0


class Pack(StageVerb):
    """`doit pack`."""

    name = "pack"
    doc_purpose = "write the artifact of one stage with its record into a file"
    doc_usage = "STAGE FILE"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.tasks.archive import pack

        graph = Selection(self)
        if len(pos_args) != 2:
            refuse("expected a stage and a file. Use: doit pack STAGE FILE")
        node = graph.one(pos_args[:1], "doit pack STAGE FILE")
        with self.alone(reads=True):
            record = graph.fresh_record(node)
            try:
                pack(node, record, Path(pos_args[1]))
            except OSError as error:
                advice = advise_on(error, "Name another file")
                refuse(f"{pos_args[1]}: cannot be written ({error.strerror}). {advice}.")
        terminal.show(f"{node.task}: {len(record['outputs'])} files packed into {pos_args[1]}")
        return 0


class Unpack(StageVerb):
    """`doit unpack`."""

    name = "unpack"
    doc_purpose = "install a packed artifact, after checking every byte of it"
    doc_usage = "FILE"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.messages.errors import MlxflowError
        from mlxflow.tasks import lockfile
        from mlxflow.tasks.archive import unpack

        graph = Selection(self)
        if len(pos_args) != 1:
            refuse("expected one file. Use: doit unpack FILE")
        with self.alone(makes=True):
            try:
                node, values = unpack(Path(pos_args[0]), {node.task: node for node in graph.nodes})
            except MlxflowError as error:
                refuse(str(error), error.exit_code)
            known = {one.task for one in graph.nodes}
            if line := lockfile.update(node.root / layout.LOCKFILE, node, values, known):
                terminal.say(line)
            graph.journal.set(node.task, "_values_:", values)
            graph.journal.set(node.task, "deps:", [])
        terminal.show(f"{node.task}: {len(values['outputs'])} files unpacked into {node.folder}")
        return 0


class Reproduce(StageVerb):
    """`doit reproduce`."""

    name = "reproduce"
    doc_purpose = "build a stage again in a scratch folder and compare every tensor"
    doc_usage = "STAGE"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.messages.errors import UserError
        from mlxflow.storage.locks import hold
        from mlxflow.tasks.reproduction import reproduce
        from mlxflow.tasks.run import ended_cleanly

        graph = Selection(self)
        node = graph.one(pos_args, "doit reproduce STAGE")
        if node.bound_device is not None:
            refuse(f"{node.task}: measures the machine; there is nothing to reproduce.")
        record = graph.fresh_record(node)
        waiting = f"{node.task}: waits for the artifacts, used by process {{holder}}"
        try:
            with ended_cleanly(), hold(layout.state_folder(node.root) / layout.LOCK, waiting, wait=True, needed=True):
                return reproduce(node, record)
        except UserError as error:
            refuse(str(error), error.exit_code)
