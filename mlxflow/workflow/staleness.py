"""Decide whether a stage is stale, and why, for doit, `doit plan`, `doit list --status` and `mlxflow report`.

A stage is compared with the record of its last run: from doit's journal if doit ran it, else from its own report, which
has only digests of its settings and inputs.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.data.sources import corpus_identity
from mlxflow.device.compute_device import environment
from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import ABSENT, reason_of
from mlxflow.storage import layout, model_files
from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.storage.paths import printable, record_name
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.outputs import damaged_outputs
from mlxflow.workflow.records import FORGOTTEN, is_complete
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness_reasons import (
    MOST_NAMED,
    damage_reasons,
    input_reasons,
    setting_reasons,
    upstream_reasons,
)

_FORGOTTEN = "forgotten by doit forget"
_OLDER = "its record is of an older version"
_UNRECORDED = "its artifact has no record: its last run was interrupted, or doit did not start it"

#: The key of a record made from a report.
_PROVENANCE = "provenance"


def observe_inputs(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every input by name.

    Raises:
        OSError: one is missing.
        ValueError: a safetensors file is damaged.
    """
    read = files_read(node)
    return {name: cache.digests(path).identity for name, path in read.items()} | observe_corpora(node, cache)


def files_read(node: Node) -> dict[str, str]:
    """Return the paths of the files that a stage reads now, by recorded name."""
    beside = (f"{folder}/{name}" for folder in node.beside for name in model_files.beside(Path(node.path(folder))))
    return {record_name(name, node.spellings): node.path(name) for name in (*node.inputs, *beside)}


def observe_corpora(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every corpus that a stage reads, by name."""
    return {name: corpus_identity(name, cache) for name in node.corpora}


def observe_settings(node: Node) -> dict[str, Any]:
    """Return everything except inputs that the artifact depends on, as JSON values."""
    return node.settings | environment(node.bound_device)


def record_of_report(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a record for an artifact that is not in doit's journal.

    Args:
        provenance: the table `stage` of the artifact's report; empty without a report.
    """
    return {_PROVENANCE: provenance} if provenance else {}


def report_of(node: Node) -> dict[str, Any] | None:
    """Return the table `stage` of the artifact's report, empty if it cannot be read; None if there is no report."""
    path = node.root / node.folder / layout.REPORT
    if not path.is_file():
        return None
    try:
        table = read_report(path).get("stage")
    except (ArtifactError, OSError):
        table = None
    return table if isinstance(table, dict) else {}


def reasons(
    node: Node, record: dict[str, Any], cache: DigestCache, *, leave_out: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield every reason why a stage is stale; nothing if it is fresh.

    Args:
        node: the stage.
        record: of its last run, from doit or `record_of_report`; empty if there was none.
        cache: digests by path.
        leave_out: artifact folders that will be rebuilt; their files are not compared.
    """
    if provenance := record.get(_PROVENANCE):
        yield from _reasons_by_report(node, provenance, cache, leave_out)
        return
    if not is_complete(record):
        if record:
            yield _FORGOTTEN if FORGOTTEN in record else _OLDER
        elif (made := report_of(node)) is None:
            yield "never built"
        else:
            yield _UNRECORDED
            yield from _reasons_by_report(node, made, cache, leave_out)
        return
    settings = observe_settings(node)
    if settings != record["settings"]:
        yield from setting_reasons(node.task, record["settings"], settings)
    if node.threads and record.get("device", "").startswith("cpu") and record.get("threads") != node.threads:
        yield f"workflow.threads: {record.get('threads', 'unknown')} -> {node.threads}"
    yield from damage_reasons(damaged_outputs(node, record, cache))
    yield from _changed_inputs(node, record["inputs"], cache, leave_out)


def _reasons_by_report(
    node: Node, provenance: dict[str, Any], cache: DigestCache, leave_out: tuple[str, ...]
) -> Iterator[str]:
    if provenance.get("settings_digest") != digest_json(observe_settings(node)):
        yield "its settings, its code or MLX changed"
    if any(name.startswith(tuple(f"{folder}/" for folder in leave_out)) for name in node.inputs):
        return  # one digest covers all inputs
    try:
        identities = observe_inputs(node, cache)
    except (OSError, ValueError):
        yield "an input is missing or damaged"
        return
    if provenance.get("inputs_digest") != digest_json(identities):
        yield "an input changed"


#: Returns the record of a stage's last run; empty if there is none.
Records = Callable[[str], dict[str, Any]]


class StaleStage(NamedTuple):
    """A stage that would run.

    Attributes:
        node: the stage.
        own_reasons: reasons why it is stale by itself.
        upstream: stale stages that it reads from.
        seconds: duration of its last run, if known.
    """

    node: Node
    own_reasons: list[str]
    upstream: list[str]
    seconds: float | None

    @property
    def is_forgotten(self) -> bool:
        """Whether `doit forget` made it stale."""
        return _FORGOTTEN in self.own_reasons

    @property
    def reasons(self) -> list[str]:
        """Every reason, in words."""
        return [*self.own_reasons, *upstream_reasons(self.upstream)]


def find_stale(
    nodes: Iterable[Node], records: Records, cache: DigestCache, is_ignored: Callable[[str], bool] = lambda task: False
) -> list[StaleStage]:
    """Return the stages that would run, in their order.

    A stage that reads from one that will run is included, although it does not run if that one's result is unchanged.

    Args:
        nodes: every stage, each after the ones it reads from.
        records: see `Records`.
        cache: digests by path.
        is_ignored: whether a stage, and with it all that read from it, is ignored.
    """
    stale: list[StaleStage] = []
    makers: dict[str, str] = {}  # of the files that will be rebuilt
    ignored: set[str] = set()  # files of stages that do not run
    for node in nodes:
        if is_ignored(node.task) or ignored.intersection(node.inputs):
            ignored.update(node.outputs)
            continue
        record = records(node.task)
        folders = tuple(one.node.folder for one in stale)
        own = list(reasons(node, record, cache, leave_out=folders))
        upstream = list(dict.fromkeys(makers[name] for name in node.inputs if name in makers))
        if own or upstream:
            stale.append(StaleStage(node, own, upstream, record.get("seconds")))
            makers.update(dict.fromkeys(node.outputs, node.task))
    return stale


def _changed_inputs(
    node: Node, before: dict[str, str], cache: DigestCache, leave_out: tuple[str, ...]
) -> Iterator[str]:
    left_out = tuple(f"{folder}/" for folder in leave_out)
    now: dict[str, str | None] = dict(observe_corpora(node, cache))
    unreadable: list[str] = []
    for name, path in files_read(node).items():
        if name.startswith(left_out):
            continue
        try:
            now[name] = cache.digests(path).identity
        except (*ABSENT, ValueError):
            now[name] = None
        except OSError as error:
            unreadable.append(f"{printable(name)} cannot be read ({reason_of(error)})")
            before = {other: identity for other, identity in before.items() if other != name}
    yield from unreadable[:MOST_NAMED]
    if len(unreadable) > MOST_NAMED:
        yield f"{len(unreadable) - MOST_NAMED:,} more files cannot be read"
    if now != before:
        yield from input_reasons(
            {name: identity for name, identity in before.items() if not name.startswith(left_out)}, now
        )
