"""`mlxflow.lock`: settings, inputs and outputs of each stage's last run, to be committed beside the workflow file.

It changes when an artifact was made differently, and only then: it holds no times, no digests of measurements (metrics,
profiles, benchmarks, the page that shows them), and the commit of the run that first made an artifact so. The journal
has what else is known of a run.

It may contain merge conflict markers. It can be read nevertheless: a stage then has a table from each side, and the one
that describes the artifact on the disk is used.
"""

import re
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.device import developer_tools
from mlxflow.messages.os_errors import naming
from mlxflow.storage import layout, toml_text
from mlxflow.storage.digests import digest_file
from mlxflow.storage.paths import printable
from mlxflow.storage.regular_files import read_regular
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.records import read_values
from mlxflow.workflow.stage_node import Node

_HEAD = "# What each stage was made of; written by doit, made to be committed.\n\n"

#: The settings with a key in a stage's table; the others are in its table `settings`.
_SETTINGS = {"seed": "seed", "version": "stage_version", "mlx": "mlx", "config": "config"}

# The first key of a table's header: `[train.config]` or `["train:a".config]`
_HEADER = re.compile(r'\[(?:"([^"]+)"|([\w-]+))[].]')

_writing = threading.Lock()

Table = dict[str, Any]


class Lock(NamedTuple):
    """The content of a lock file.

    Attributes:
        tables: the readable tables of each stage, ours first; several after a merge.
        damage: why the file is not valid; empty if it is.
    """

    tables: dict[str, list[Table]]
    damage: str = ""


def describe(node: Node, values: dict[str, Any]) -> Table:
    """Return a stage's table for the lock file: `measured` names the files whose digests it leaves out.

    Args:
        node: the stage.
        values: its record.
    """
    import platform

    settings = values["settings"]
    others = {key: value for key, value in settings.items() if key not in _SETTINGS}
    return {
        **{name: settings[key] for key, name in _SETTINGS.items() if key in settings},
        **({"settings": others} if others else {}),
        "python": platform.python_version(),
        "device": values.get("device", "unknown"),
        "commit": values.get("commit", "unknown"),
        **{key: values[key] for key in ("threads", "ranks") if key in values},
        **({"measured": sorted(map(printable, node.measured))} if node.measured else {}),
        "inputs": {printable(name): digest for name, digest in values["inputs"].items() if name not in node.measured},
        "outputs": {
            name: _digest(node, name, content)
            for name, (_, content) in values["outputs"].items()
            if name not in node.measured
        },
    }


def _digest(node: Node, name: str, content: str) -> str:
    """Return the digest of an output for the lock: of a report its identity, which leaves out times and hosts."""
    return digest_file(Path(node.path(name))).identity if name.endswith(f"/{layout.REPORT}") else content


def recorded(table: Table) -> dict[str, Any] | None:
    """Return the record of a table; None if the table is incomplete.

    Its `outputs` are digests by name, without sizes; the names of its `inputs` are escaped to one line. Tables of
    earlier versions have digests of measurements, too, and the `seconds` of the run.
    """
    others = table.get("settings", {})
    settings = {key: table[name] for key, name in _SETTINGS.items() if name in table}
    rest = {key: table.get(key, "unknown") for key in ("inputs", "outputs", "device", "commit")}
    rest |= {key: table[key] for key in ("threads", "ranks", "seconds") if key in table}
    if not isinstance(others, dict) or not isinstance(rest["outputs"], dict):
        return None
    sized = {name: [0, digest] for name, digest in rest["outputs"].items()}
    sized |= {name: [0, "0"] for name in measured(table)}
    try:
        record = read_values({"settings": settings | others, **rest, "outputs": sized})
    except InvalidStateError:
        return None
    return record | {"outputs": rest["outputs"]}


def measured(table: Table) -> list[str]:
    """Return the names of the inputs and outputs, escaped to one line, whose digests a table leaves out."""
    names = table.get("measured", [])
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def update(path: Path, node: Node, values: dict[str, Any], known: set[str]) -> str:
    """Write a stage's table into the lock file; tables of stages that no longer exist are removed.

    Args:
        path: the lock file.
        node: the stage.
        values: its record.
        known: the names of all stages of the workflow.

    Returns:
        a line about damage of the file; empty if there was none.
    """
    with _writing:
        lock = read(path)
        tables = {name: stage_tables[0] for name, stage_tables in lock.tables.items() if name in known}
        table, before = describe(node, values), tables.get(node.task, {})
        if "commit" in before and before | {"commit": table["commit"]} == table:
            table = before
        _write(path, tables | {node.task: table})
    if not lock.damage:
        return ""
    listed = ", ".join(tables) or "no stage"
    return f"{path}: {lock.damage}. The tables of {listed} are kept; the rest is written when its stages run."


def settle_merge(path: Path, nodes: Iterable[Node], describes: Callable[[Node, Table], bool]) -> str:
    """Resolve merge conflict markers in a lock file.

    Args:
        path: the lock file; nothing is done if it has no markers or does not exist.
        nodes: every stage.
        describes: whether a table describes the current artifact of a stage.

    Returns:
        a line about what was done; empty if nothing was.
    """
    try:
        with naming(path):
            is_marked = re.search(rb"^<{7}", read_regular(path), re.MULTILINE)
    except FileNotFoundError:
        return ""
    if not is_marked or not (lock := read(path)).damage:
        return ""
    tables: dict[str, Table] = {}
    for node in nodes:
        if stage_tables := lock.tables.get(node.task):
            tables[node.task] = next(
                (stage_table for stage_table in stage_tables if describes(node, stage_table)), stage_tables[0]
            )
    with _writing:
        _write(path, tables)
    return f"{path}: {lock.damage}. For each stage the side that describes its artifact here is kept."


def read(path: Path) -> Lock:
    """Return the readable content of a lock file; empty if there is none."""
    import tomllib

    try:
        with naming(path):
            text = read_regular(path).decode(errors="replace")
    except FileNotFoundError:
        return Lock({})
    try:
        return Lock({name: [table] for name, table in toml_text.loads(text).items() if isinstance(table, dict)})
    except tomllib.TOMLDecodeError as error:
        sides = _sides(text)
        tables: dict[str, list[Table]] = {}
        for side in sides or [text]:
            for name, table in _parse_parts(side):
                if table not in tables.setdefault(name, []):
                    tables[name].append(table)
        return Lock(tables, "contains merge conflict markers" if sides else f"damaged ({error})")


def _sides(text: str) -> list[str]:
    """Return both sides of a text with merge conflict markers; empty if it has none."""
    sides: tuple[list[str], list[str]] = ([], [])
    taken: tuple[list[str], ...] = sides
    is_marked = False
    for line in text.splitlines(keepends=True):
        if re.match(r"<{7}|>{7}|\|{7}|={7}\s*$", line):
            taken = {"<": sides[:1], "|": (), "=": sides[1:], ">": sides}[line[0]]
            is_marked = True
            continue
        for side in taken:
            side.append(line)
    return ["".join(side) for side in sides] if is_marked else []


def _parse_parts(text: str) -> Iterator[tuple[str, Table]]:
    """Yield the tables of stages from the parts of a text that are valid TOML by themselves."""
    import tomllib

    parts: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if header := _HEADER.match(line):
            name = header[1] or header[2]
        parts[name] = parts.get(name, "") + line
    for name, part in parts.items():
        try:
            table = toml_text.loads(part).get(name)
        except tomllib.TOMLDecodeError:
            continue
        if isinstance(table, dict):
            yield name, table


def _write(path: Path, tables: dict[str, Table]) -> None:
    import tomli_w

    from mlxflow.storage.atomic_folders import write_whole

    write_whole(path, (_HEAD + tomli_w.dumps(_sorted(tables))).encode())


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value


def source_commit(folder: Path) -> str:
    """Return the git commit of a folder, with `+changes` if files differ from it; `unknown` without git."""
    program = developer_tools.find("git")
    if program is None:
        return "unknown"

    def git(*arguments: str) -> str:
        command = [program, "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
