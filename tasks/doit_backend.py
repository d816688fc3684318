"""doit's dependency database as a journal: a line for each finished stage, flushed before the next one starts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxflow.messages import terminal
from mlxflow.messages.errors import UserError
from mlxflow.messages.os_errors import naming
from mlxflow.storage import state_files
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow import journal
from mlxflow.workflow.journal import IGNORED, KEPT_KEYS, VALUES
from mlxflow.workflow.records import FORGOTTEN

# A journal with more than this many lines for each task, plus the slack, is rewritten when doit ends.
_COMPACT_FACTOR = 4
_COMPACT_SLACK = 64

#: The name of this backend, in the settings of doit and among its entry points.
BACKEND = "mlxflow"

#: The keys that doit sets last for a finished task, and for one that is ignored.
_LAST_KEYS = frozenset({"deps:", IGNORED})


class Journal:
    """A doit backend that loses no finished stage and trusts no unfinished one.

    A record is appended and flushed to the disk when doit has set its last key; a removed record is removed on the disk
    at once. An incomplete last line is ignored. Any other invalid line or record is ignored, too, and its stage is
    built again; a line is printed, and the first command that may write rewrites the journal.

    doit's own record of a task's inputs is not stored, because its paths depend on the current folder. A task's
    `uptodate` object compares the inputs by other names, and the journal reports them as unchanged to doit.

    Args:
        name: the file.
        codec: doit's codec for values; unused, records are JSON.
        module_name: part of doit's signature; unused.

    Attributes:
        adopt: returns the record of a task that is not in the journal from elsewhere, or None.
        keeps_adopted: whether such a record is written into the journal; not by commands that only read.
        unwritable: raised instead of writing if the artifacts cannot be locked.
    """

    desc = "append-only journal, flushed for each finished stage"

    def __init__(self, name: str, codec: object, *, module_name: str | None = None) -> None:
        self.name = name
        self.adopt: Callable[[str], dict[str, Any] | None] = lambda task: None
        self.keeps_adopted = False
        self.unwritable: UserError | None = None
        self._said: set[str] = set()
        self._data: bytes | None = None
        self._reset()
        self.load()

    def load(self) -> None:
        """Read the journal again; unchanged bytes are not parsed again."""
        try:
            data = state_files.read_bytes(self.name)
        except FileNotFoundError:
            self._reset()
            return
        except InvalidStateError as error:
            self._reset()
            self._ignore(f"not valid state ({error})", "Every stage is as if it was never built.")
            return
        if data == self._data and not self._asked:
            return
        self._reset()
        self._data = data
        contents = journal.parse(data)
        self._records.update(contents.entries)
        self._lines, self._torn = contents.num_lines, contents.is_torn
        for what, reason in contents.damage.items():
            self._ignore(f"{what} is not valid state ({reason})", "It is as if it were not there.")

    def _reset(self) -> None:
        self._records: dict[str, dict[str, Any]] = {}
        self._asked: set[str] = set()
        self._lines = 0
        self._torn = False
        self._damaged = False
        self._data = None  # the parsed bytes; None after a change of a record

    def _ignore(self, what: str, effect: str) -> None:
        """Print once what is ignored; the next command that writes replaces the file."""
        self._damaged = True
        if what not in self._said:
            self._said.add(what)
            terminal.say(f"{self.name}: {what}. {effect}")

    def repair(self) -> None:
        """Rewrite the journal without invalid lines; call it under the lock."""
        if self._damaged:
            self._rewrite()

    def check_writable(self) -> None:
        """Refuse changes without the lock.

        Raises:
            UserError: the lock file cannot be created.
        """
        if self.unwritable:
            raise self.unwritable

    def _append(self, task_id: str) -> None:
        from mlxflow.storage.flushing import flush_drive

        self.check_writable()
        Path(self.name).parent.mkdir(parents=True, exist_ok=True)
        if self._damaged:
            self._rewrite()
            return
        line = json.dumps({"task": task_id, "record": self._records.get(task_id)}, separators=(",", ":"))
        data = (("\n" if self._torn else "") + line + "\n").encode()
        self._torn = True  # until the line is complete
        with naming(self.name), open(self.name, "ab", buffering=0, opener=_open_to_append) as file:
            while data:
                data = data[file.write(data) :]
            flush_drive(file.fileno())
        self._torn = False
        self._lines += 1

    def record(self, task_id: str) -> dict[str, Any]:
        """Return a copy of a task's record."""
        return dict(self._record(task_id))

    def _record(self, task_id: str) -> dict[str, Any]:
        """Return a task's record, adopted if necessary; empty if there is none."""
        if task_id not in self._records and task_id not in self._asked:
            self._asked.add(task_id)
            if values := self.adopt(task_id):
                self._records[task_id] = {VALUES: values}
                if self.keeps_adopted:
                    self._append(task_id)
        return self._records.get(task_id, {})

    def get(self, task_id: str, dependency: str) -> Any:
        """Return a value of a task's record, or None; for an input, True if there is a record."""
        record = self._records.get(task_id) or self._record(task_id)
        if dependency in KEPT_KEYS or dependency in _LAST_KEYS:
            return record.get(dependency)
        return bool(record) or None

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Set a value; the record is written when its last one is set."""
        if dependency == IGNORED:
            self._record(task_id)  # adopt its record first: ignoring keeps it
        self._data = None
        record = self._records.setdefault(task_id, {})
        if dependency in KEPT_KEYS:
            record[dependency] = value
        if dependency in _LAST_KEYS:
            self._append(task_id)

    def in_(self, task_id: str) -> bool:
        """Return whether there is a record of a task."""
        return bool(self._record(task_id))

    def remove(self, task_id: str) -> None:
        """Remove a task's record, on the disk, too; this process does not adopt one again."""
        self._asked.add(task_id)
        if self._records.pop(task_id, None) is not None:
            self._append(task_id)

    def remove_all(self) -> None:
        """Remove every record."""
        for task_id in list(self._records):
            self.remove(task_id)

    def forget(self, task_id: str) -> None:
        """Remove a task's record and prevent adoption: the task is stale until it runs."""
        self._records[task_id] = {VALUES: {FORGOTTEN: True}}
        self._append(task_id)

    def dump(self) -> None:
        """Rewrite the journal if most of its lines are outdated."""
        if self._lines <= _COMPACT_FACTOR * len(self._records) + _COMPACT_SLACK:
            return
        self._rewrite()

    def _rewrite(self) -> None:
        from mlxflow.storage.atomic_folders import write_whole

        self.check_writable()
        lines = [
            json.dumps({"task": task, "record": record}, separators=(",", ":"))
            for task, record in sorted(self._records.items())
        ]
        place = Path(self.name)
        if place.is_symlink():  # never write through a link
            place.unlink()
        write_whole(place, "".join(line + "\n" for line in lines).encode())
        self._lines = len(lines)
        self._torn = self._damaged = False


def _open_to_append(name: str, flags: int) -> int:
    return os.open(name, flags | state_files.NO_SURPRISES, 0o666)
