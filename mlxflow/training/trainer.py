"""The training loop: when updates, validations, records and checkpoints happen.

The host builds the next update while the device computes this one. It waits where a value is logged, every
`lazy_eval_every` steps, and where memory is read; the records hold how long it waited, and for what.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.data.loader import DeviceBatch, Loader
from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.messages.errors import StageError
from mlxflow.training.batch_size import BatchSizes, split
from mlxflow.training.checkpoints import Checkpoint, CheckpointStore
from mlxflow.training.memory_watch import MemoryWatch
from mlxflow.training.recorder import Log, Recorder
from mlxflow.training.run_state import Result, RunState
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.snapshots import Snapshots
from mlxflow.training.step import Gradients, Outcome, Step, out_of_memory_bytes
from mlxflow.training.validation import Validator

_NAMES = SettingNames()


class TrainingData(NamedTuple):
    """The rows that a training run reads.

    Attributes:
        open_loader: takes rows of a batch and rows used so far; returns the loader that continues after them.
        validation: rows measured before the first step, every `eval_every` steps and after the last.
    """

    open_loader: Callable[[int, int], Loader]
    validation: Rows


class Session(NamedTuple):
    """The environment of a training run.

    Attributes:
        checkpoints: stores checkpoints and the best weights.
        memory_limit_bytes: of MLX.
        log: called with each record.
        stop_requested: checked between forward passes; training then saves a checkpoint and ends.
    """

    checkpoints: CheckpointStore
    memory_limit_bytes: int
    log: Log = lambda record: None
    stop_requested: Callable[[], bool] = lambda: False


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
        self._facts = RunState()
        self._loader: Loader | None = None
        self._loader_rows = 0
        self._waited_before = 0.0  # wait for data in closed loaders and in earlier runs
        self._partial: Gradients | None = None
        self._pending: deque[_Pending] = deque()
        self._shapes: set[tuple[str, int]] = set()
        self._recorder = Recorder(self._facts, sizes, session.log)
        self._memory = MemoryWatch(sizes, session.memory_limit_bytes)
        self._snapshots = Snapshots(model, step, sizes, self._facts)
        self._validator = Validator(
            model,
            data.validation,
            settings,
            state=self._facts,
            recorder=self._recorder,
            checkpoints=session.checkpoints,
        )

    def run(self, checkpoint: Checkpoint | None = None) -> Result:
        """Train to the end.

        Args:
            checkpoint: to continue from; its records are not logged again.

        Raises:
            StageError: the loss stays without a finite value.
            WorkflowError: no batch fits into the memory.
            Stopped: a signal arrived; the checkpoint is saved.
        """
        facts, settings = self._facts, self._settings
        phase_peaks.reset()
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self._recorder.write(self._sizes.decisions[-1].record())
            self._validator.validate()
        self._recorder.begin = time.perf_counter() - facts.seconds
        try:
            while facts.step < settings.num_steps and not facts.ended_early:
                self._update()
                self._after_update()
        finally:
            self._close_loader()
        self._settle(0)
        self._facts.note_peak()
        if settings.keep == "best" and facts.best_step < facts.step:
            self._model.load_weights(list(self._session.checkpoints.read_best(facts.best_step).items()), strict=False)
        mx.eval(self._step.state)
        return self._facts.result()

    def _after_update(self) -> None:
        facts, settings = self._facts, self._settings
        at_end = facts.step == settings.num_steps
        if facts.step % settings.lazy_eval_every == 0 or (facts.step - 1) % settings.log_every == 0:
            self._settle(1)  # one stays on the device, so that it is not idle
        if at_end or (settings.eval_every and facts.step % settings.eval_every == 0):
            self._settle(0)
            with self._recorder.paused():
                self._validator.validate()
        if settings.save_every and facts.step % settings.save_every == 0 and not at_end and not facts.ended_early:
            self._save()
        if not at_end and self._session.stop_requested():
            raise Stopped(facts.step, self._save())

    def _update(self) -> None:
        """Send one update to the device; wait for it where memory is read or something is compiled."""
        facts, settings = self._facts, self._settings
        number = facts.step + 1
        batch, cursor = self._next_batch()
        looks = bool(settings.adjust_every) and (number == 1 or number % settings.adjust_every == 0)
        compiles = self._new_shapes(len(batch.tokens))
        if looks or compiles:
            self._settle(0)
            self._facts.note_peak()
            phase_peaks.reset()
        begin = time.perf_counter()
        outcome = self._step.update(self._accumulate(batch, waits=looks or compiles))
        mx.async_eval(outcome, self._step.state)
        self._pending.append(_Pending(number, outcome, batch.targets))
        facts.step, facts.rows_done, facts.cursor = number, 0, cursor
        facts.tokens += batch.targets
        if looks or compiles:
            self._wait(self._step.state)
        if compiles:
            facts.compile_seconds += time.perf_counter() - begin
            facts.compile_tokens += batch.targets
        if looks and (decision := self._memory.look(number)) is not None:
            self._recorder.write(decision.record())

    def _new_shapes(self, rows: int) -> bool:
        """Note the shapes of an update; return whether one of them is new."""
        sizes = {end - begin for begin, end in split(rows, self._sizes.size)}
        kind = "compute" if self._is_one_pass(rows) else "add"
        new = {(kind, size) for size in sizes} - self._shapes
        self._shapes |= new
        return bool(new)

    def _accumulate(self, batch: DeviceBatch, *, waits: bool) -> Gradients:
        """Return the gradients of all rows of an update, with smaller batches after an allocation failed."""
        while True:
            if self._sizes.must_shrink(self._facts.step):
                self._recorder.write(self._sizes.follow_shrink(self._facts.step).record())
            try:
                return self._pass_over(batch, waits=waits)
            except RuntimeError as error:
                needed = out_of_memory_bytes(error)
                if needed is None:
                    raise
            self._partial, self._facts.rows_done = None, 0
            self._recorder.write(self._memory.shrink(self._facts.step, needed).record())
            waits = True  # the next one may be too large, too

    def _pass_over(self, batch: DeviceBatch, *, waits: bool) -> Gradients:
        rows, facts = len(batch.tokens), self._facts
        if self._is_one_pass(rows):
            gradients = self._step.compute(batch.tokens, batch.marks)
            self._send(gradients, waits=waits)
            return gradients
        so_far = self._partial
        for begin, end in split(rows, self._sizes.size):
            if end <= facts.rows_done:
                continue
            so_far = self._step.add(batch.tokens[begin:end], batch.marks[begin:end], so_far)
            self._send(so_far, waits=waits)
            facts.rows_done, self._partial = end, so_far
            if end < rows and self._session.stop_requested():
                raise Stopped(facts.step, self._save())
        self._partial = None
        return cast("Gradients", so_far)

    def _is_one_pass(self, rows: int) -> bool:
        return rows <= self._sizes.size and self._partial is None

    def _send(self, gradients: Gradients, *, waits: bool) -> None:
        if waits:
            self._wait(gradients)
        else:
            mx.async_eval(gradients)

    def _next_batch(self) -> tuple[DeviceBatch, int]:
        """Return the rows of the next update, and the rows used with them."""
        rows = self._sizes.rows_per_update
        if self._loader is None or rows != self._loader_rows:
            self._close_loader()
            self._loader = self._data.open_loader(rows, self._facts.cursor).__enter__()
            self._loader_rows = rows
        batch = next(self._loader)
        self._facts.data_wait_seconds = self._waited_before + self._loader.waited_seconds
        return batch, self._loader.cursor

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._waited_before += self._loader.waited_seconds
            self._loader.__exit__(None, None, None)
            self._loader = None

    def _wait(self, what: Any) -> None:
        begin = time.perf_counter()
        mx.eval(what)
        self._facts.device_wait_seconds += time.perf_counter() - begin

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
        with self._recorder.paused():
            self._facts.note_peak()
            facts = self._facts
            arrays = dict(tree_flatten(self._snapshots.arrays(self._partial)))
            name = f"{facts.step:06}" + (f"-{facts.rows_done:06}" if facts.rows_done else "")
            saved_facts = vars(facts) | {"sizes": self._sizes.state()}
            return self._session.checkpoints.save(
                name, arrays, saved_facts, "".join(line + "\n" for line in self._recorder.lines)
            )

    def unfit(self, checkpoint: Checkpoint) -> str:
        """Return why this run cannot continue from a checkpoint; empty if it can."""
        return self._snapshots.unfit(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._partial = self._snapshots.restore(checkpoint)
        self._waited_before = self._facts.data_wait_seconds
        self._recorder.lines = checkpoint.metrics.splitlines()
