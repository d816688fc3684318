"""Results of a model on the items of a task, and their cache: one file for each model and task."""

from pathlib import Path
from typing import Any

import msgspec

from mlxflow.storage import atomic_folders, state_files
from mlxflow.storage.state_files import InvalidStateError

# The most cached results in a folder; the least recently used is removed first
_MOST_FILES = 1000

_SUFFIX = ".json"


class ItemResult(msgspec.Struct, frozen=True, array_like=True):
    """The result of one item.

    Attributes:
        item: its line in the task's file; for lm-eval the task and the number of the document.
        score: 1 if it is right, 0 if not; a metric of lm-eval may lie between.
        nats: log-likelihoods of the completion or of each choice; empty for generated answers.
        text: the generated answer; None for others.
        cut_tokens: number of the prompt's first tokens that were left out.
    """

    item: str
    score: float
    nats: tuple[float, ...] = ()
    text: str | None = None
    cut_tokens: int = 0

    def named(self) -> dict[str, object]:
        """Return the fields by name, without those that say nothing."""
        shown = {"nats": self.nats, "text": self.text, "cut_tokens": self.cut_tokens}
        return {"item": self.item, "score": self.score} | {
            key: one for key, one in shown.items() if one not in ((), None, 0)
        }


class TaskResult(msgspec.Struct, frozen=True):
    """The results of a model on a task.

    Attributes:
        kind: "completion", "choice", "exact match", or "lm-eval".
        uses_chat: whether the chat template wrote the prompts.
        items: in the order of the task.
        metrics: further figures by name.
        num_truncated: prompts that did not fit into the model's context whole.
    """

    kind: str
    uses_chat: bool
    items: list[ItemResult]
    metrics: dict[str, float]
    num_truncated: int


class ResultCache:
    """Results by a digest of everything that they depend on, kept between runs.

    Args:
        folder: of the files; made when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> TaskResult | None:
        """Return the result of a key; None if it is not there. A damaged file is ignored."""
        file = self._file(key)
        try:
            table: dict[str, Any] = state_files.read(file)
            result = msgspec.convert(table["result"], TaskResult)
            file.touch()
        except InvalidStateError as error:
            state_files.say_ignored(file, error, "It is computed again.")
            return None
        except (OSError, KeyError, msgspec.ValidationError):
            return None
        return result

    def put(self, key: str, result: TaskResult) -> None:
        """Store a result and remove the oldest ones beyond the limit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic_folders.write_whole(self._file(key), state_files.encode({"result": msgspec.to_builtins(result)}))
        files = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-_MOST_FILES]:
            file.unlink(missing_ok=True)

    def clear(self, keys: list[str]) -> None:
        """Remove results."""
        for key in keys:
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"
