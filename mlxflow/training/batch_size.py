"""How many rows a forward pass takes, from what the memory really holds.

A larger batch keeps a GPU busier and a smaller one fits. Rows per update stay the same unless they are asked to follow:
then the result does not depend on the memory, but for the rounding of sums. Every decision is kept with the reading
behind it, and a list of decisions can be followed again.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.errors import SourceError, WorkflowError
from mlxflow.system.os_errors import advise_on
from mlxflow.training.settings import SettingNames, TrainingSettings

_NAMES = SettingNames()


class MemoryUse(NamedTuple):
    """What MLX holds, and may hold.

    Attributes:
        active_bytes: held by arrays now.
        peak_bytes: most that arrays held since the peak was last reset.
        cache_bytes: freed and kept for reuse.
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
    """From which step on how many rows go into a forward pass, and why.

    Attributes:
        step: the update it was taken after, 0 before the first.
        batch_size: rows from then on.
        reason: "begin", "grow", "shrink" or "out of memory".
        reading: the memory then, by name; empty where none was read.
    """

    step: int
    batch_size: int
    reason: str
    reading: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return it as a line of a log."""
        return {"kind": "batch_size", **self._asdict()}


def ladder(batch_size: int, max_batch_size: int) -> list[int]:
    """Return the sizes a batch may have: from half of `batch_size` up, each about a third or a half larger."""
    sizes = {batch_size, max_batch_size}
    half = max(1, batch_size // 2)
    doubled = half
    while doubled <= max_batch_size:
        sizes |= {doubled, doubled * 3 // 2}
        doubled *= 2
    return sorted(size for size in sizes if half <= size <= max_batch_size)


def split(rows: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield where each forward pass's rows begin and end; the last may be fewer, and none are dropped."""
    for begin in range(0, rows, batch_size):
        yield begin, min(rows, begin + batch_size)


class BatchSizes:
    """Decides the batch size as training goes on.

    Args:
        settings: of the training: the batch size to begin with and how it may change.
        replay: decisions to follow instead of the memory.
        names: of the settings, for messages.

    Attributes:
        size: rows of a forward pass, now.
        decisions: all so far.
    """

    def __init__(
        self, settings: TrainingSettings, *, replay: Iterable[Decision] = (), names: SettingNames = _NAMES
    ) -> None:
        self._is_fixed = not settings.dynamic_batch_size
        is_constant = settings.constant_tokens_per_step or self._is_fixed
        self._rows_per_update = settings.rows_per_step if is_constant else None
        self._grad_accum_steps = settings.grad_accum_steps
        size = settings.batch_size
        most = max(size, settings.max_batch_size)
        self._sizes = ladder(size, max(size, min(most, settings.rows_per_step)) if is_constant else most)
        self._grow_below, self._shrink_above = settings.grow_below, settings.shrink_above
        self._too_large = most + 1
        self._replay = {(one.step, one.reason == "out of memory"): one for one in replay}
        self._is_replaying = bool(self._replay)
        self._names = names
        self.size = size
        self.decisions: list[Decision] = []
        self._decide(Decision(0, self._replayed(0, size), "begin", {}))

    def _replayed(self, step: int, batch_size: int) -> int:
        found = self._replay.get((step, False))
        return found.batch_size if found else batch_size

    @property
    def rows_per_update(self) -> int:
        """Rows whose gradients the next update sums."""
        return self._rows_per_update or self.size * self._grad_accum_steps

    def look(self, step: int, reading: MemoryUse) -> Decision | None:
        """Decide after an update, from the memory it took; return the decision if it changes the size.

        A batch grows only to a size that is expected to stay under `shrink_above`, taking the memory beyond what is
        always held to grow with it, and never again to one that was too large.
        """
        if self._is_replaying:
            found = self._replay.get((step, False))
            return self._decide(found) if found and step > 0 else None
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
        """Return whether a replayed run ran out of memory in the update after a step, with more rows than now."""
        found = self._replay.get((step, True))
        return found is not None and found.batch_size < self.size

    def follow_shrink(self, step: int) -> Decision:
        """Take the decision that `must_shrink` found."""
        return self._decide(self._replay[step, True])

    def run_out(self, step: int, reading: MemoryUse, needed_bytes: int) -> Decision:
        """Decide when the device could not hold a forward pass in the update after a step.

        Raises:
            WorkflowError: there is no smaller size.
        """
        place = self._sizes.index(self.size) if self.size in self._sizes else 0
        if place == 0:
            raise self.too_large(needed_bytes, reading.limit_bytes)
        self._too_large = min(self._too_large, self.size)
        return self._decide(Decision(step, self._sizes[place - 1], "out of memory", reading._asdict()))

    def too_large(self, needed_bytes: int, limit_bytes: int) -> WorkflowError:
        """Return the error for a memory limit that not even the smallest batch keeps to."""
        names = self._names
        fused = f" and {names.of('fused_loss')} = true" if names.has_fused_loss else ""
        return WorkflowError(
            f"{names.of('batch_size')}: forward passes of {self.size} rows, the fewest, need {needed_bytes:,} bytes "
            f"and may use {limit_bytes:,}. Lower {names.of('batch_size')} or {names.context_length}, set "
            f'{names.of("checkpointing")} = "layers"{fused}, or raise {names.memory_limit}.'
        )

    def _decide(self, decision: Decision) -> Decision:
        self.size = decision.batch_size
        self.decisions.append(decision)
        return decision

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"size": self.size, "too_large": self._too_large, "decisions": [one._asdict() for one in self.decisions]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.size, self._too_large = state["size"], state["too_large"]
        self.decisions = [Decision(**one) for one in state["decisions"]]


def read_decisions(path: Path, key: str) -> list[Decision]:
    """Return the decisions in the metrics of another run.

    Args:
        path: its `metrics.jsonl`.
        key: the setting that names it, for the message.

    Raises:
        SourceError: the file cannot be read, or has none.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("kind") == "batch_size":
                found.append(Decision(**{name: record[name] for name in Decision._fields}))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        advice = advise_on(error, "Name one")
        raise SourceError(f"{key}: {path} cannot be read as a run's metrics.jsonl ({error}). {advice}.") from error
    if not found:
        raise SourceError(f"{key}: {path} holds no batch size. Name the metrics.jsonl of a run of this version.")
    return found
