"""How long the ranks of a distributed training waited for each other, from the records of metrics.jsonl.

Validations and checkpoints are part of the time: ranks wait for rank 0, which writes the checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlxflow.report.formatting import number


class WaitSpan(NamedTuple):
    """The steps between two records.

    Attributes:
        begin: the step of the first record; 0 before any.
        end: the step of the second.
        shares: of the time that each rank waited for the others, by rank.
    """

    begin: float
    end: float
    shares: tuple[float, ...]

    @property
    def slowest(self) -> int:
        """The rank for which the others waited: it waited the least."""
        return min(range(len(self.shares)), key=lambda rank: self.shares[rank])


def wait_spans(records: Sequence[Mapping[str, Any]]) -> list[WaitSpan]:
    """Return the waiting between each two records of updates; empty for a training on one process.

    Args:
        records: of metrics.jsonl; what is no number is left out.
    """
    return list(_spans([record for record in records if record.get("kind") == "train"]))


def _spans(records: Sequence[Mapping[str, Any]]) -> Iterator[WaitSpan]:
    step, seconds = 0.0, 0.0
    waited: tuple[float, ...] = ()
    for record in records:
        now, clock, waits = number(record.get("step")), number(record.get("elapsed_seconds")), _waits(record)
        if now is None or clock is None or not waits:
            continue
        if clock < seconds or len(waits) != len(
            waited
        ):  # resumed, maybe on another number of ranks: clocks begin again
            seconds, waited = 0.0, (0.0,) * len(waits)
        if now > step and clock > seconds:
            shares = (min(1.0, max(0.0, a - b) / (clock - seconds)) for a, b in zip(waits, waited, strict=True))
            yield WaitSpan(step, now, tuple(shares))
        step, seconds, waited = now, clock, waits


def _waits(record: Mapping[str, Any]) -> tuple[float, ...]:
    waits = record.get("rank_waited_seconds")
    found = [number(value) for value in waits] if isinstance(waits, list) else []
    return tuple(value for value in found if value is not None) if None not in found else ()
