"""What doit remembers between runs: a journal with a line for each finished stage, on the disk before the next."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxflow.errors import UserError
from mlxflow.storage import state_files
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.system import terminal
from mlxflow.system.os_errors import naming
from mlxflow.workflow import journal
from mlxflow.workflow.journal import IGNORED, KEPT_KEYS, VALUES
from mlxflow.workflow.records import FORGOTTEN

# A journal with this many lines for each task that it knows, and some more, is rewritten when doit ends.
_COMPACT_FACTOR = 4
_COMPACT_SLACK = 64

#: The name of this backend, in the settings of doit and among its entry points.
BACKEND = "mlxflow"

#: The keys that doit sets last: of a finished task, and of one that the user told it to ignore.
_LAST_KEYS = frozenset({"deps:", IGNORED})


class Journal:
    """A doit backend that loses no finished stage and trusts no unfinished one.

    Every record is appended and flushed to the disk when doit has set its last key; a record that is dropped is dropped
    on the disk at once. A torn last line is as if it had not been written; any other line that cannot be read, or that
    holds no valid record, is as if it were not there, and costs the stage it was about a rebuild. That is said in one
    line, and the journal is written again by the first verb that may write.

    doit's own record of a task's inputs is not kept: it holds paths that depend on where doit was called. A task's
    `uptodate` object compares its inputs under names of its own, and the journal tells doit that they are unchanged.

    Args:
        name: the file.
        codec: doit's codec for values; unused, records are JSON.
        module_name: part of doit's signature; unused.

    Attributes:
        adopt: returns the record of a task that the journal does not know, if it can be had elsewhere.
        keeps_adopted: whether such a record is written into the journal; not by verbs that only look.
        unwritable: raised instead of writing anything, where the artifacts cannot be locked.
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
        """Read the journal, forgetting what was known before; the same bytes as before are not parsed again."""
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
        self._data = None  # what the records were made of; None once one differs from that

    def _ignore(self, what: str, effect: str) -> None:
        """Say once what cannot be used; the next verb that writes replaces the file."""
        self._damaged = True
        if what not in self._said:
            self._said.add(what)
            terminal.say(f"{self.name}: {what}. {effect}")

    def mend(self) -> None:
        """Write the journal again without what was not valid; to be called under the lock."""
        if self._damaged:
            self._rewrite()

    def check_writable(self) -> None:
        """Refuse to change anything without the lock.

        Raises:
            UserError: the lock's file cannot be made.
        """
        if self.unwritable:
            raise self.unwritable

    def _append(self, task_id: str) -> None:
        self.check_writable()
        Path(self.name).parent.mkdir(parents=True, exist_ok=True)
        if self._damaged:
            self._rewrite()
            return
        line = json.dumps({"task": task_id, "record": self._records.get(task_id)}, separators=(",", ":"))
        data = (("\n" if self._torn else "") + line + "\n").encode()
        self._torn = True  # until all of it is there
        with naming(self.name), open(self.name, "ab", buffering=0, opener=_open_to_append) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        self._torn = False
        self._lines += 1

    def record(self, task_id: str) -> dict[str, Any]:
        """Return all that is known of a task."""
        return dict(self._record(task_id))

    def _record(self, task_id: str) -> dict[str, Any]:
        """Return a task's record, empty where there is none here or elsewhere."""
        if task_id not in self._records and task_id not in self._asked:
            self._asked.add(task_id)
            if values := self.adopt(task_id):
                self._records[task_id] = {VALUES: values}
                if self.keeps_adopted:
                    self._append(task_id)
        return self._records.get(task_id, {})

    def get(self, task_id: str, dependency: str) -> Any:
        """Return one value of a task's record, or None; of an input, whether there is a record at all."""
        record = self._records.get(task_id) or self._record(task_id)
        if dependency in KEPT_KEYS or dependency in _LAST_KEYS:
            return record.get(dependency)
        return bool(record) or None

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Set one value; the record is written when its last one is set."""
        if dependency == IGNORED:
            self._record(task_id)  # is ignored beside what is known of it
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
        """Drop a task's record, on the disk too; it is not adopted again by this process."""
        self._asked.add(task_id)
        if self._records.pop(task_id, None) is not None:
            self._append(task_id)

    def remove_all(self) -> None:
        """Drop every record."""
        for task_id in list(self._records):
            self.remove(task_id)

    def forget(self, task_id: str) -> None:
        """Drop a task's record so that none is adopted in its place: the task is stale until it runs."""
        self._records[task_id] = {VALUES: {FORGOTTEN: True}}
        self._append(task_id)

    def dump(self) -> None:
        """Rewrite the journal when most of its lines are about the past."""
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
        if place.is_symlink():  # a link is no state, and what it leads to is no business of ours
            place.unlink()
        write_whole(place, "".join(line + "\n" for line in lines).encode())
        self._lines = len(lines)
        self._torn = self._damaged = False


def _open_to_append(name: str, flags: int) -> int:
    return os.open(name, flags | state_files.NO_SURPRISES, 0o666)
