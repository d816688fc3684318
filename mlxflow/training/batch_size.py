"""Dynamic batch size: rows in a forward pass, chosen from measured memory use.

A larger batch uses a GPU better, a smaller one needs less memory. The rows of an update stay the same unless the
settings say otherwise, so the result does not depend on the memory, except for the rounding of sums. Every decision is
recorded with the memory reading behind it, and a recorded list of decisions can be replayed.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.messages.byte_sizes import show_apart, show_bytes
from mlxflow.messages.errors import SourceError, WorkflowError
from mlxflow.messages.os_errors import advise_on
from mlxflow.training.memory_advice import memory_advice
from mlxflow.training.settings import SettingNames, TrainingSettings

_NAMES = SettingNames()


class MemoryUse(NamedTuple):
    """Memory of MLX and its limit, in bytes.

    Attributes:
        active_bytes: of arrays now.
        peak_bytes: highest value of `active_bytes` since the peak was last reset.
        cache_bytes: freed buffers that are kept for reuse.
        limit_bytes: the memory limit.
    """

    active_bytes: int
    peak_bytes: int
    cache_bytes: int
    limit_bytes: int

    @classmethod
    def take(cls, limit_bytes: int) -> "MemoryUse":
        """Read MLX's counters."""
        active = mx.get_active_memory()
        return cls(active, max(active, mx.get_peak_memory()), mx.get_cache_memory(), limit_bytes)

    @property
    def used(self) -> float:
        """The peak as a share of the limit."""
        return self.peak_bytes / self.limit_bytes


class Decision(NamedTuple):
    """A change of the batch size, and its reason.

    Attributes:
        step: the update it was taken after, 0 before the first.
        batch_size: rows from then on.
        reason: "begin", "grow", "shrink" or "out of memory".
        reading: the memory then, by name; empty if none was read.
    """

    step: int
    batch_size: int
    reason: str
    reading: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return the decision as a record of `metrics.jsonl`."""
        return {"kind": "batch_size", **self._asdict()}


def ladder(batch_size: int, max_batch_size: int) -> list[int]:
    """Return the allowed batch sizes: from half of `batch_size` up, each a third or a half larger than the last."""
    sizes = {batch_size, max_batch_size}
    half = max(1, batch_size // 2)
    doubled = half
    while doubled <= max_batch_size:
        sizes |= {doubled, doubled * 3 // 2}
        doubled *= 2
    return sorted(size for size in sizes if half <= size <= max_batch_size)


def shrink_note(settings: TrainingSettings, names: SettingNames, *, peak_bytes: float, limit_bytes: int) -> str:
    """Return what a training within the memory limit does with its batch, a sentence; empty if it keeps the rows.

    Args:
        settings: of the training.
        names: of the settings.
        peak_bytes: predicted of a step.
        limit_bytes: memory limit of MLX.
    """
    most = settings.shrink_above * limit_bytes
    if not settings.dynamic_batch_size or settings.batch_size == 1 or peak_bytes <= most:
        return ""
    return (
        f"A pass of more than {show_bytes(most)} ({names.of('shrink_above')} = {settings.shrink_above:g}) gets fewer "
        f"rows, and a step more passes. Set {names.of('dynamic_batch_size')} = false to keep {settings.batch_size}."
    )


def split(rows: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of the rows of each forward pass; the last may have fewer rows, none are dropped."""
    for begin in range(0, rows, batch_size):
        yield begin, min(rows, begin + batch_size)


class BatchSizes:
    """Chooses the batch size during training.

    Args:
        settings: of the training: the batch size to begin with and how it may change.
        replay: recorded decisions to follow instead of the memory.
        names: of the settings, for messages.
        ranks: processes that share the rows of an update; a batch grows no larger than the share of one.

    Attributes:
        size: rows of the next forward pass.
        decisions: made so far.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        *,
        replay: Iterable[Decision] = (),
        names: SettingNames = _NAMES,
        ranks: int = 1,
    ) -> None:
        self._is_fixed = not settings.dynamic_batch_size
        is_constant = settings.constant_tokens_per_step or self._is_fixed
        self._rows_per_update = settings.rows_per_step if is_constant else None
        self._grad_accum_steps = settings.grad_accum_steps
        share = -(-settings.rows_per_step // ranks)
        size = min(settings.batch_size, share) if is_constant and not self._is_fixed else settings.batch_size
        most = max(size, settings.max_batch_size)
        self._sizes = ladder(size, max(size, min(most, share)) if is_constant else most)
        self._grow_below, self._shrink_above = settings.grow_below, settings.shrink_above
        self._too_large = most + 1
        self._replay = {(one.step, one.reason == "out of memory"): one for one in replay}
        self._is_replaying = bool(self._replay)
        self._settings, self._names = settings, names
        self.size = size
        self.decisions: list[Decision] = []
        self._decide(Decision(0, self._replayed(0, size), "begin", {}))

    def _replayed(self, step: int, batch_size: int) -> int:
        decision = self._replay.get((step, False))
        return decision.batch_size if decision else batch_size

    @property
    def rows_per_update(self) -> int:
        """Rows whose gradients the next update sums."""
        return self._rows_per_update or self.size * self._grad_accum_steps

    def look(self, step: int, reading: MemoryUse) -> Decision | None:
        """Choose the batch size after an update, from the memory it used; return the decision if the size changes.

        A batch grows only to a size that is predicted to stay under `shrink_above`, where all memory except what is
        always held grows with the rows, and never again to a size that was too large.
        """
        if self._is_replaying:
            decision = self._replay.get((step, False))
            return self._decide(decision) if decision and step > 0 else None
        if self._is_fixed:
            return None
        place = self._sizes.index(self.size)
        numbers = reading._asdict()
        if reading.used > self._shrink_above and place > 0:
            self._too_large = min(self._too_large, self.size)
            return self._decide(Decision(step, self._sizes[place - 1], "shrink", numbers))
        if reading.used < self._grow_below and place + 1 < len(self._sizes):
            larger = self._sizes[place + 1]
            growing = reading.peak_bytes - reading.active_bytes
            expected = (reading.active_bytes + growing * larger / self.size) / reading.limit_bytes
            if larger < self._too_large and expected < self._shrink_above:
                return self._decide(Decision(step, larger, "grow", numbers))
        return None

    def must_shrink(self, step: int) -> bool:
        """Return whether the replayed run ran out of memory in the update after a step, with more rows than now."""
        decision = self._replay.get((step, True))
        return decision is not None and decision.batch_size < self.size

    def follow_shrink(self, step: int) -> Decision:
        """Apply the decision that `must_shrink` found."""
        return self._decide(self._replay[step, True])

    def run_out(self, step: int, reading: MemoryUse, needed_bytes: int) -> Decision:
        """Choose a smaller size after a forward pass in the update after a step ran out of memory.

        Raises:
            WorkflowError: there is no smaller size.
        """
        place = self._sizes.index(self.size) if self.size in self._sizes else 0
        if place == 0:
            raise self.too_large(needed_bytes, reading.limit_bytes)
        self._too_large = min(self._too_large, self.size)
        return self._decide(Decision(step, self._sizes[place - 1], "out of memory", reading._asdict()))

    def avoid(self, step: int, rows: int, reading: MemoryUse) -> Decision | None:
        """Choose a size below one that ran out of memory; return the decision, None if the size is smaller already.

        Args:
            step: updates so far.
            rows: of the forward passes that ran out of memory.
            reading: the memory now.

        Raises:
            WorkflowError: there is no smaller size.
        """
        self._too_large = min(self._too_large, rows)
        if self.size < rows:
            return None
        smaller = [size for size in self._sizes if size < rows]
        if not smaller:
            raise self._too_little(rows, "ran out of memory")
        return self._decide(Decision(step, smaller[-1], "out of memory", reading._asdict()))

    def too_large(self, needed_bytes: int, limit_bytes: int) -> WorkflowError:
        """Return the error for a memory limit that the smallest batch exceeds."""
        needed, limit = show_apart(needed_bytes, limit_bytes)
        return self._too_little(self.size, f"need {needed} and may use {limit}")

    def _too_little(self, rows: int, what: str) -> WorkflowError:
        advice = memory_advice(self._settings, self._names, rows=rows)
        return WorkflowError(
            f"{self._names.of('batch_size')}: forward passes of {rows} row{'s' * (rows != 1)}, the fewest, {what}. "
            f"{advice}"
        )

    def _decide(self, decision: Decision) -> Decision:
        self.size = decision.batch_size
        self.decisions.append(decision)
        return decision

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {
            "size": self.size,
            "too_large": self._too_large,
            "decisions": [decision._asdict() for decision in self.decisions],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.size, self._too_large = state["size"], state["too_large"]
        if not (self._is_fixed or self._is_replaying) and self.size not in self._sizes:  # of another number of ranks
            self.size = max((size for size in self._sizes if size < self.size), default=self._sizes[0])
        self.decisions = [Decision(**one) for one in state["decisions"]]


def read_decisions(path: Path, key: str) -> list[Decision]:
    """Return the decisions in the metrics of another run.

    Args:
        path: its `metrics.jsonl`.
        key: the setting that names it, for the message.

    Raises:
        SourceError: the file cannot be read, or holds no decisions.
    """
    decisions = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("kind") == "batch_size":
                decisions.append(Decision(**{name: record[name] for name in Decision._fields}))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        advice = advise_on(error, "Name one")
        raise SourceError(f"{key}: {path} cannot be read as a run's metrics.jsonl ({error}). {advice}.") from error
    if not decisions:
        raise SourceError(f"{key}: {path} holds no batch size. Name the metrics.jsonl of a run of this version.")
    return decisions
