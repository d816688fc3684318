"""The state of a tuning of a whole model, saved now and then, so that an interrupted run continues from there.

A method that trains all layers at once is saved in the middle: what is trained, averages of the optimizer, and the
number of the step, from which the rows of further steps follow. A run that continues ends in the same bytes.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import msgspec

from mlxflow.messages import terminal
from mlxflow.quantization.kept_tensors import KeptTensors, facts_of

_FOLDER, _NAME = "tuning", "state"

# Seconds between two saves, at least; and in durations of a save, so that large ones take few percent of the time
_SECONDS, _DURATIONS = 60.0, 20


class TuningState(NamedTuple):
    """The state of a tuning.

    Attributes:
        number: of finished steps.
        arrays: by name.
        losses: of the finished steps; empty if the method does not need them.
    """

    number: int
    arrays: dict[str, mx.array]
    losses: list[float]


class _TuningFacts(msgspec.Struct):
    number: int
    total: int
    losses: list[float]


class TuningSaves:
    """Saves the state of a tuning, and returns that of an interrupted run.

    Args:
        folder: of this run only; None to save nothing.
        identity: of everything that the result depends on: the state of another one is not used.
        task: the stage, for messages.
        total: number of steps.
        clock: returns seconds.

    Attributes:
        begun: the state of an interrupted run; None without one.
    """

    def __init__(
        self, folder: Path | None, identity: str, *, task: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kept = None
        if folder is not None:
            self._kept = KeptTensors(folder / _FOLDER, identity, effect="The steps are taken again.")
        self._task, self._total, self._clock = task, total, clock
        self._due = clock() + _SECONDS
        self._latest: tuple[int, Callable[[], Mapping[str, mx.array]], list[float]] | None = None
        self._watch: Callable[[Sequence[float]], None] | None = None
        self.begun = self._read()
        if self.begun is not None:
            terminal.say(f"{task}: resumes from step {self.begun.number:,} of {total:,} of the tuning")

    @property
    def first(self) -> int:
        """The number of steps that an interrupted run has done."""
        return 0 if self.begun is None else self.begun.number

    def note(self, number: int, arrays: Callable[[], Mapping[str, mx.array]], losses: Sequence[float] = ()) -> None:
        """Take the state after a step, and save it if it is time.

        Args:
            number: of finished steps.
            arrays: returns those of the state by name; called when it is saved, at the latest after the next step.
            losses: of the finished steps.
        """
        self._latest = number, arrays, list(losses)
        if self._clock() >= self._due:
            self._save()
        if self._watch is not None:
            self._watch(losses)

    def watched_by(self, watch: Callable[[Sequence[float]], None]) -> None:
        """Call a function with the losses of the finished steps after each further step."""
        self._watch = watch

    def forget(self) -> None:
        """Let go of the state of the last step, which is about to change."""
        self._latest = None

    @contextmanager
    def saving_on_signals(self) -> Iterator[None]:
        """Save the state of the last step if a signal ends the block by KeyboardInterrupt or SystemExit."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if self._kept is not None and self._latest is not None:
                number = self._latest[0]
                self._save()
                steps = f"step {number:,} of {self._total:,} of the tuning"
                terminal.say(f"{self._task}: stopped after {steps}; the next run resumes from there")
            raise
        finally:
            self._latest = None

    def _save(self) -> None:
        if self._kept is None or self._latest is None:
            return
        begin = self._clock()
        number, arrays, losses = self._latest
        self._kept.write(_NAME, arrays(), msgspec.structs.asdict(_TuningFacts(number, self._total, losses)))
        end = self._clock()
        self._due = end + max(_SECONDS, _DURATIONS * (end - begin))

    def _read(self) -> TuningState | None:
        found = None if self._kept is None else self._kept.read(_NAME)
        if found is None:
            return None
        facts = msgspec.convert(found.facts, _TuningFacts)
        mx.eval(found.tensors)  # the file is removed when the next state is saved
        return TuningState(facts.number, found.tensors, facts.losses)


def unsaved() -> TuningSaves:
    """Return what saves nothing, for a tuning that is not resumed."""
    return TuningSaves(None, "", task="", total=0)


def remove_saves(folder: Path) -> None:
    """Remove the saved state, if there is one: the result is stored."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def tuning_progress(folder: Path) -> tuple[int, int]:
    """Return the finished steps of a saved state, and their number, by its facts alone; zeros without one."""
    facts = facts_of(folder / _FOLDER, _NAME)
    number, total = facts.get("number"), facts.get("total")
    return (number, total) if isinstance(number, int) and isinstance(total, int) else (0, 0)
