"""The training loop: when updates, validations, records and checkpoints happen.

The host builds the next update while the device computes this one. It waits where a value is logged, every
`lazy_eval_every` steps, and where memory is read; the records hold how long it waited, and for what.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.device import memory_errors, phase_peaks
from mlxflow.distributed.team import SOLO, Team
from mlxflow.messages.errors import StageError
from mlxflow.training.accumulation import Accumulator, RunParts, wait
from mlxflow.training.batch_size import BatchSizes
from mlxflow.training.batches import Batches, TrainingData
from mlxflow.training.checkpoints import Checkpoint, CheckpointStore
from mlxflow.training.memory_watch import MemoryWatch
from mlxflow.training.rank_accumulation import RankAccumulator
from mlxflow.training.recorder import Log, Recorder
from mlxflow.training.run_state import Result, RunState
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.snapshots import Snapshots
from mlxflow.training.step import Outcome, Step
from mlxflow.training.validation import Validator

_NAMES = SettingNames()


class Session(NamedTuple):
    """The environment of a training run.

    Attributes:
        checkpoints: stores checkpoints and the best weights.
        memory_limit_bytes: that peaks stay within where the training can do with it.
        log: called with each record.
        stop_requested: checked between forward passes; training then saves a checkpoint and ends.
        team: the ranks of a distributed run.
        digests: of what all ranks must share, by its name in words.
        on_step: called with the number of updates when the host has waited for the device, more often than `log`.
    """

    checkpoints: CheckpointStore
    memory_limit_bytes: int
    log: Log = lambda record: None
    stop_requested: Callable[[], bool] = lambda: False
    team: Team = SOLO
    digests: Mapping[str, str] = MappingProxyType({})
    on_step: Callable[[int], None] = lambda step: None


class Stopped(Exception):  # noqa: N818 - no error: a signal asks for it
    """Training was stopped, and its checkpoint is saved.

    Attributes:
        step: the last complete update.
        checkpoint: its folder.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.checkpoint = checkpoint


class _Pending(NamedTuple):
    """An update that was sent to the device."""

    step: int
    outcome: Outcome
    targets: int


class Trainer:
    """Runs a number of updates on a model.

    Args:
        model: in training mode.
        step: of the same model.
        settings: of the training.
        sizes: chooses the rows of a forward pass.
        data: the rows.
        session: the environment of the run.
        names: of the settings, for messages.

    Attributes:
        save_last: writes the checkpoint of the last step and returns its folder, even if the model was changed since;
            None before the end of `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        settings: TrainingSettings,
        *,
        sizes: BatchSizes,
        data: TrainingData,
        session: Session,
        names: SettingNames = _NAMES,
    ) -> None:
        self._model = model
        self._step = step
        self._settings = settings
        self._sizes = sizes
        self._data = data
        self._session = session
        self._names = names
        self.save_last: Callable[[], Path] | None = None
        self._facts = RunState()
        self._pending: deque[_Pending] = deque()
        self._recorder = Recorder(self._facts, sizes, session.log)
        self._team = session.team
        self._memory = MemoryWatch(sizes, session.memory_limit_bytes, self._facts.note_peak, self._team)
        self._snapshots = Snapshots(model, step, sizes, self._facts)
        self._batches = Batches(data, self._facts)
        parts = RunParts(step, sizes, self._memory, self._recorder, self._batches, self._facts)
        self._accumulator: Accumulator | RankAccumulator = (
            Accumulator(parts, session.stop_requested, self._stop)
            if self._team.size == 1
            else RankAccumulator(self._team, parts, session.stop_requested, names)
        )
        self._validator = Validator(
            model,
            data.validation,
            settings,
            state=self._facts,
            recorder=self._recorder,
            checkpoints=session.checkpoints,
            team=self._team,
            stop_requested=session.stop_requested,
        )

    def run(self, checkpoint: Checkpoint | None = None) -> Result:
        """Train to the end.

        Args:
            checkpoint: to continue from; its records are not logged again.

        Raises:
            StageError: the loss stays without a finite value.
            WorkflowError: no batch fits into the memory.
            RuntimeError: the device ran out of memory in work that cannot be repeated.
            Stopped: a signal arrived; the checkpoint is saved.
        """
        phase_peaks.reset()
        with self._memory.opened():
            return self._run(checkpoint)

    def _run(self, checkpoint: Checkpoint | None) -> Result:
        facts, settings = self._facts, self._settings
        if checkpoint is not None:
            self._restore(checkpoint)
        self._accumulator.begin(self._session.digests)
        if checkpoint is None:
            self._recorder.write(self._sizes.decisions[-1].record())
        self._recorder.begin = time.perf_counter() - facts.seconds
        if self._validates and not self._recorder.has_validation(facts.step):  # or it was interrupted
            with self._recorder.paused():
                self._validate()
        self._avoid_too_many_rows()
        try:
            while facts.step < settings.num_steps and not facts.ended_early:
                self._update()
                self._after_update()
        finally:
            self._batches.close()
        self._settle(0)
        self._facts.note_peak()
        if self._team.exchange("end of the training", [int(self._session.stop_requested())]).any():
            self._stop()
        self.save_last = self._keep_last()
        self._accumulator.finish()
        self._step.end()
        if settings.keep == "best" and facts.best_step < facts.step and self._team.rank.is_first:
            self._model.load_weights(list(self._session.checkpoints.read_best(facts.best_step).items()), strict=False)
        mx.eval(self._step.state)
        return self._facts.result()._replace(
            rank_waited_seconds=tuple(self._recorder.rank_waited_seconds),
            memory_limit_bytes=self._session.memory_limit_bytes,
        )

    def _avoid_too_many_rows(self) -> None:
        """Lower the batch size if an earlier start of the ranks ran out of memory with it, on all of them alike."""
        rows = self._team.rank.too_many_rows
        if rows and (decision := self._memory.avoid(self._facts.step, rows)) is not None:
            self._accumulator.partial, self._facts.rows_done = None, 0  # sums of passes of another size
            self._recorder.write(decision.record())

    def _after_update(self) -> None:
        facts, settings = self._facts, self._settings
        at_end = facts.step == settings.num_steps
        if facts.step % settings.lazy_eval_every == 0 or (facts.step - 1) % settings.log_every == 0:
            self._settle(1)  # one stays on the device, so that it is not idle
            self._memory.note_updates()
            self._session.on_step(facts.step)
        if self._validates:
            self._settle(0)
            with self._recorder.paused():
                self._validate()
        if settings.save_every and facts.step % settings.save_every == 0 and not at_end and not facts.ended_early:
            self._save()
        if not at_end and self._accumulator.stop_requested():
            self._stop()

    @property
    def _validates(self) -> bool:
        """Whether a validation belongs to the current step."""
        step, settings = self._facts.step, self._settings
        is_regular = bool(settings.eval_every) and step % settings.eval_every == 0
        return step in (0, settings.num_steps) or is_regular

    def _validate(self) -> None:
        """Measure the validation loss; a signal meanwhile ends the run with a checkpoint of before."""
        self._team.batch_size = 0
        with self._step.evaluating(), self._memory.validation():
            is_measured = self._validator.validate()
        if not is_measured:
            self._stop()

    def _keep_last(self) -> Callable[[], Path]:
        """Return a function that writes the checkpoint of the end; of ranks that share the state it is written now."""
        if self._step.shards is None and self._step.layers is None:
            return self._snapshot()
        folder = self._save()  # the other ranks end soon, and their parts with them
        return lambda: folder

    def _stop(self) -> NoReturn:
        raise Stopped(self._facts.step, self._save())

    def _update(self) -> None:
        """Send one update to the device; wait for it where memory is read or something is compiled."""
        facts, settings = self._facts, self._settings
        number = facts.step + 1
        looks = bool(settings.adjust_every) and (number == 1 or number % settings.adjust_every == 0)
        compiles = self._accumulator.take_batch(is_whole=looks)
        if looks or compiles:
            self._settle(0)
            memory_errors.settle()  # what fails from here on is this update's own work, and can be repeated
            self._memory.reset()
        with self._memory.decisive_update() if looks else nullcontext():
            self._send_update(number, waits=looks or compiles, compiles=compiles)
        if looks and (decision := self._memory.look(number)) is not None:
            self._recorder.write(decision.record())

    def _send_update(self, number: int, *, waits: bool, compiles: bool) -> None:
        """Send one update to the device, and wait for it if asked."""
        facts, settings = self._facts, self._settings
        begin = time.perf_counter()
        summed = self._accumulator.accumulate(waits=waits)
        outcome, targets = self._step.update(summed.gradients), summed.targets
        facts.step, facts.rows_done, facts.cursor = number, 0, summed.cursor
        del summed  # MLX frees gradients as the update reads them, but not while Python holds them
        mx.async_eval(outcome, self._step.state)
        self._pending.append(_Pending(number, outcome, targets))
        facts.tokens += targets
        self._accumulator.after_update(compares=number % settings.log_every == 0)
        if waits:
            self._wait(self._step.state)
        if compiles:
            facts.compile_seconds += time.perf_counter() - begin
            facts.compile_tokens += targets

    def _wait(self, what: Any) -> None:
        self._team.beat("sum of gradients", waits=True)
        wait(what, self._facts)
        self._team.beat("update")

    def _settle(self, ahead: int) -> None:
        """Wait for all updates except a few, read their figures, and write the records that are due.

        Raises:
            StageError: too many updates in a row had no finite loss and gradient.
        """
        facts, settings, names = self._facts, self._settings, self._names
        while len(self._pending) > ahead:
            done = self._pending.popleft()
            self._wait(done.outcome)
            loss, norm, rate = (float(value) for value in done.outcome[:3])
            if bool(done.outcome.is_finite):
                facts.bad_in_a_row = 0
                facts.window_loss += loss * done.targets
                facts.window_targets += done.targets
            else:
                facts.bad_in_a_row += 1
                facts.skipped_steps += 1
                if facts.bad_in_a_row >= settings.max_bad_steps:
                    raise StageError(
                        f"{names.table or 'training'}: {facts.bad_in_a_row} steps in a row had no finite loss and "
                        f"gradient, the last being step {done.step} (loss {loss}, gradient norm {norm}) with learning "
                        f"rate {rate:.3g}. "
                        f"Lower {names.of('learning_rate')}."
                    )
            if done.step % settings.log_every == 0 or done.step == settings.num_steps:
                self._recorder.train(done.step, norm, rate)

    def _save(self) -> Path:
        """Write a checkpoint and return its folder."""
        self._settle(0)
        self._team.batch_size = 0
        self._team.exchange("checkpoint", ())  # fails if a rank was lost: its last gradients may have been missing
        self._team.beat("checkpoint")
        with self._recorder.paused():
            self._facts.note_peak()
            return self._snapshot()()

    def _snapshot(self) -> Callable[[], Path]:
        """Return a function that writes a checkpoint of the present state; it holds the arrays, and nothing else."""
        facts, store = self._facts, self._session.checkpoints
        arrays = dict(tree_flatten(self._snapshots.arrays(self._accumulator.partial)))
        name = f"{facts.step:06}" + (f"-{facts.rows_done:06}" if facts.rows_done else "")
        saved_facts = vars(facts) | {"sizes": self._sizes.state()}
        metrics = "".join(line + "\n" for line in self._recorder.lines)
        return lambda: store.save(name, arrays, saved_facts, metrics)

    def unfit(self, checkpoint: Checkpoint) -> str:
        """Return why this run cannot continue from a checkpoint; empty if it can."""
        return self._snapshots.unfit(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._accumulator.partial = self._snapshots.restore(checkpoint)
        self._batches.restore()
        self._recorder.lines = checkpoint.metrics.splitlines()
