"""What doit remembers between runs: a journal with a line for each finished stage, on the disk before the next."""

import json
import os
from pathlib import Path
from typing import Any

# A journal with this many lines for each task that it knows, and some more, is rewritten when doit ends.
_COMPACT_FACTOR = 4
_COMPACT_SLACK = 64

#: The keys that doit sets last: of a finished task, and of one that the user told it to ignore.
_LAST_KEYS = frozenset({"deps:", "ignore:"})

#: The keys of a record that are kept; every other one is the path of an input as doit sees it.
_KEPT_KEYS = frozenset({"_values_:", "result:", "checker:", "ignore:"})


class Journal:
    """A doit backend that loses no finished stage and trusts no unfinished one.

    Every record is appended and flushed to the disk when doit has set its last key; a record that is dropped is dropped
    on the disk at once. A torn last line is as if it had not been written; any other line that cannot be read costs the
    stage it was about a rebuild.

    doit's own record of a task's inputs is not kept: it holds paths that depend on where doit was called. A task's
    `uptodate` object compares its inputs under names of its own, and the journal tells doit that they are unchanged.

    Args:
        name: the file.
        codec: doit's codec for values; unused, records are JSON.
        module_name: part of doit's signature; unused.
    """

    desc = "append-only journal, flushed for each finished stage"

    def __init__(self, name: str, codec: object, *, module_name: str | None = None) -> None:
        self.name = name
        self.load()

    def load(self) -> None:
        """Read the journal, forgetting what was known before."""
        self._records: dict[str, dict[str, Any]] = {}
        self._lines = 0
        self._torn = False
        try:
            data = Path(self.name).read_bytes()
        except FileNotFoundError:
            return
        self._torn = not data.endswith(b"\n")
        for line in data.splitlines():
            self._lines += 1
            try:
                entry = json.loads(line)
                task, record = entry["task"], entry["record"]
            except (ValueError, TypeError, KeyError):
                continue
            if isinstance(record, dict):
                self._records[str(task)] = record
            else:
                self._records.pop(str(task), None)

    def _append(self, task_id: str) -> None:
        line = json.dumps({"task": task_id, "record": self._records.get(task_id)}, separators=(",", ":"))
        Path(self.name).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (("\n" if self._torn else "") + line + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._torn = False
        self._lines += 1

    def get(self, task_id: str, dependency: str) -> Any:
        """Return one value of a task's record, or None; of an input, whether there is a record at all."""
        if dependency in _KEPT_KEYS or dependency in _LAST_KEYS:
            return self._records.get(task_id, {}).get(dependency)
        return self.in_(task_id) or None

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Set one value; the record is written when its last one is set."""
        record = self._records.setdefault(task_id, {})
        if dependency in _KEPT_KEYS:
            record[dependency] = value
        if dependency in _LAST_KEYS:
            self._append(task_id)

    def in_(self, task_id: str) -> bool:
        """Return whether there is a record of a task."""
        return task_id in self._records

    def remove(self, task_id: str) -> None:
        """Drop a task's record, on the disk too."""
        if self._records.pop(task_id, None) is not None:
            self._append(task_id)

    def remove_all(self) -> None:
        """Drop every record."""
        for task_id in list(self._records):
            self.remove(task_id)

    def dump(self) -> None:
        """Rewrite the journal when most of its lines are about the past."""
        if self._lines <= _COMPACT_FACTOR * len(self._records) + _COMPACT_SLACK:
            return
        from mlxflow.artifact import write_whole

        lines = [
            json.dumps({"task": task, "record": record}, separators=(",", ":"))
            for task, record in sorted(self._records.items())
        ]
        write_whole(Path(self.name), "".join(line + "\n" for line in lines).encode())
        self._lines = len(lines)
