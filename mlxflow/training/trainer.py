"""The training loop: updates, validation, checkpoints, and a record of all three.

The host builds the next update while the device computes this one. It waits where a value is shown, every
`lazy_eval_every` steps, and where memory is looked at; how long it waited, and for what, is in the records.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxflow.data.loader import DeviceBatch, Loader
from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.errors import StageError
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.training.batch_size import BatchSizes, Decision, Reading, split
from mlxflow.training.checkpoints import Checkpoint, CheckpointStore
from mlxflow.training.restoring import unlike_arrays, unlike_facts, unlike_sizes
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.step import Gradients, Outcome, Step, out_of_memory_bytes, put_random_key

#: Called with one record for each log line; the key "kind" is "train", "validation" or "batch_size".
Log = Callable[[dict[str, Any]], None]

# How often MLX is told a lower limit, a quarter lower each time, before a step is taken to need what it takes
_MOST_THROTTLES = 4

_NAMES = SettingNames()


class TrainingData(NamedTuple):
    """The rows that a training run reads.

    Attributes:
        open_loader: takes rows of a batch and rows used so far; returns the loader that goes on from there.
        validation: measured before the first step, every `eval_every` steps and after the last.
    """

    open_loader: Callable[[int, int], Loader]
    validation: Rows


class Session(NamedTuple):
    """What surrounds a training run.

    Attributes:
        checkpoints: where checkpoints and the best weights go.
        memory_limit_bytes: what MLX may hold.
        log: takes each record.
        stop_requested: checked between forward passes; training then saves a checkpoint and ends.
    """

    checkpoints: CheckpointStore
    memory_limit_bytes: int
    log: Log = lambda record: None
    stop_requested: Callable[[], bool] = lambda: False


class Result(NamedTuple):
    """What a training run came to; seconds without validation and checkpoints.

    Attributes:
        steps: updates; fewer than planned where training ended early.
        best_step: of the lowest validation loss.
        skipped_steps: updates without a finite loss or gradient.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    compile_seconds: float
    data_wait_seconds: float
    device_wait_seconds: float
    first_validation_loss: float
    last_validation_loss: float
    best_validation_loss: float
    best_step: int
    skipped_steps: int
    peak_memory_bytes: int


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """Training was asked to stop, and its checkpoint is saved.

    Attributes:
        step: the last whole update.
        checkpoint: where it lies.
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


class _Facts:
    """What a checkpoint keeps beside arrays: numbers by name."""

    def __init__(self) -> None:
        self.step = 0
        self.cursor = 0
        self.rows_done = 0
        self.tokens = 0
        self.compile_tokens = 0
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self.data_wait_seconds = 0.0
        self.device_wait_seconds = 0.0
        self.bad_in_a_row = 0
        self.skipped_steps = 0
        self.first_loss = self.last_loss = self.best_loss = float("nan")
        self.best_step = 0
        self.validations_since_best = 0
        self.peak_memory_bytes = 0
        self.window_loss = 0.0
        self.window_targets = 0
        self.ended_early = False


class Trainer:
    """Runs a number of updates on a model.

    Args:
        model: in training mode.
        step: of the same model.
        settings: of the training.
        sizes: decides how many rows a forward pass takes.
        data: the rows.
        session: what surrounds the run.
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
        self._facts = _Facts()
        self._loader: Loader | None = None
        self._loader_rows = 0
        self._waited_before = 0.0  # for data, by loaders that are closed and by runs before this one
        self._partial: Gradients | None = None
        self._pending: deque[_Pending] = deque()
        self._shapes: set[tuple[str, int]] = set()
        self._told_limit = session.memory_limit_bytes
        self._throttled = 0
        self._lines: list[str] = []
        self._begin = time.perf_counter()

    # --- the run

    def run(self, checkpoint: Checkpoint | None = None) -> Result:
        """Train to the end.

        Args:
            checkpoint: to go on from; its records are not logged again.

        Raises:
            StageError: the loss stays without a finite value.
            WorkflowError: no batch fits into the memory.
            Stopped: somebody asked for it; the checkpoint is saved.
        """
        facts, settings = self._facts, self._settings
        phase_peaks.reset()
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self._record(self._sizes.decisions[-1].record())
            self._validate()
        self._begin = time.perf_counter() - facts.seconds
        try:
            while facts.step < settings.num_steps and not facts.ended_early:
                self._update()
                self._after_update()
        finally:
            self._close_loader()
        self._settle(0)
        self._note_peak()
        if settings.keep == "best" and facts.best_step < facts.step:
            self._model.load_weights(list(self._session.checkpoints.read_best(facts.best_step).items()), strict=False)
        mx.eval(self._step.state)
        return self._result()

    def _after_update(self) -> None:
        facts, settings = self._facts, self._settings
        at_end = facts.step == settings.num_steps
        if facts.step % settings.lazy_eval_every == 0 or (facts.step - 1) % settings.log_every == 0:
            self._settle(1)  # one stays on the device, which is not left idle
        if at_end or (settings.eval_every and facts.step % settings.eval_every == 0):
            self._settle(0)
            with self._paused():
                self._validate()
        if settings.save_every and facts.step % settings.save_every == 0 and not at_end and not facts.ended_early:
            self._save()
        if not at_end and self._session.stop_requested():
            raise Stopped(facts.step, self._save())

    def _result(self) -> Result:
        facts = self._facts
        return Result(
            steps=facts.step,
            tokens=facts.tokens,
            seconds=facts.seconds,
            tokens_per_second=self._rate(),
            compile_seconds=facts.compile_seconds,
            data_wait_seconds=facts.data_wait_seconds,
            device_wait_seconds=facts.device_wait_seconds,
            first_validation_loss=facts.first_loss,
            last_validation_loss=facts.last_loss,
            best_validation_loss=facts.best_loss,
            best_step=facts.best_step,
            skipped_steps=facts.skipped_steps,
            peak_memory_bytes=facts.peak_memory_bytes,
        )

    # --- one update

    def _update(self) -> None:
        """Send one update to the device; wait for it where memory is looked at and where something is compiled."""
        facts, settings = self._facts, self._settings
        number = facts.step + 1
        batch, cursor = self._next_batch()
        looks = bool(settings.adjust_every) and (number == 1 or number % settings.adjust_every == 0)
        compiles = self._new_shapes(len(batch.tokens))
        if looks or compiles:
            self._settle(0)
            self._note_peak()
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
        if looks:
            self._look()

    def _new_shapes(self, rows: int) -> bool:
        """Note the shapes of an update; return whether one of them comes for the first time."""
        sizes = {end - begin for begin, end in split(rows, self._sizes.size)}
        kind = "compute" if self._is_one_pass(rows) else "add"
        new = {(kind, size) for size in sizes} - self._shapes
        self._shapes |= new
        return bool(new)

    def _accumulate(self, batch: DeviceBatch, *, waits: bool) -> Gradients:
        """Return the gradients of all rows of an update, with smaller batches where the memory does not suffice."""
        while True:
            if self._sizes.must_shrink(self._facts.step):
                self._note(self._sizes.follow_shrink(self._facts.step))
            try:
                return self._pass_over(batch, waits=waits)
            except RuntimeError as error:
                needed = out_of_memory_bytes(error)
                if needed is None:
                    raise
            self._partial, self._facts.rows_done = None, 0
            mx.clear_cache()
            reading = Reading.take(self._session.memory_limit_bytes)
            self._note(self._sizes.run_out(self._facts.step, reading, reading.active_bytes + needed))
            waits = True  # the next one may be too large as well

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

    # --- memory

    def _look(self) -> None:
        """Read the memory that the last update took by itself, and choose the batch size for the next ones."""
        mx.synchronize()  # a result is there before the buffers behind it are given back
        reading = Reading.take(self._session.memory_limit_bytes)
        decision = self._sizes.look(self._facts.step, reading)
        if decision is not None:
            self._note(decision)
        elif reading.used > 1:
            self._throttle(reading)

    def _throttle(self, reading: Reading) -> None:
        """Tell MLX a lower limit: it lets the host run less far ahead, but takes its limit for a guideline.

        Raises:
            WorkflowError: that was done and did not help.
        """
        self._throttled += 1
        if self._throttled > _MOST_THROTTLES:
            raise self._sizes.too_large(reading.peak_bytes, reading.limit_bytes)
        self._told_limit = max(reading.active_bytes, self._told_limit * 3 // 4)
        mx.set_memory_limit(self._told_limit)
        mx.clear_cache()

    def _note(self, decision: Decision) -> None:
        self._record(decision.record())

    def _note_peak(self) -> None:
        self._facts.peak_memory_bytes = max(self._facts.peak_memory_bytes, mx.get_peak_memory(), mx.get_active_memory())

    # --- waiting and records

    def _wait(self, what: Any) -> None:
        begin = time.perf_counter()
        mx.eval(what)
        self._facts.device_wait_seconds += time.perf_counter() - begin

    def _settle(self, ahead: int) -> None:
        """Wait for all updates but some, read what they came to, and record what is due.

        Raises:
            StageError: too many in a row had no finite loss and gradient.
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
                self._record(self._train_record(done.step, norm, rate))

    def _train_record(self, step: int, norm: float, rate: float) -> dict[str, Any]:
        facts = self._facts
        facts.seconds = time.perf_counter() - self._begin
        loss = facts.window_loss / facts.window_targets if facts.window_targets else float("nan")
        facts.window_loss, facts.window_targets = 0.0, 0
        self._note_peak()
        return {
            "kind": "train",
            "step": step,
            "loss": loss if loss == loss else None,
            "gradient_norm": norm if abs(norm) < float("inf") else None,
            "learning_rate": rate,
            "tokens": facts.tokens,
            "tokens_per_second": self._rate(),
            "batch_size": self._sizes.size,
            "skipped_steps": facts.skipped_steps,
            "seconds": facts.seconds,
            "data_wait_seconds": facts.data_wait_seconds,
            "device_wait_seconds": facts.device_wait_seconds,
            "compile_seconds": facts.compile_seconds,
            "active_memory_bytes": mx.get_active_memory(),
            "cache_memory_bytes": mx.get_cache_memory(),
            "peak_memory_bytes": facts.peak_memory_bytes,
        }

    def _rate(self) -> float:
        """Return tokens a second of wall-clock time, updates that compiled something left out."""
        facts = self._facts
        tokens, seconds = facts.tokens - facts.compile_tokens, facts.seconds - facts.compile_seconds
        if tokens <= 0 or seconds <= 0:
            tokens, seconds = facts.tokens, facts.seconds
        return tokens / seconds if seconds > 0 else 0.0

    def _record(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        self._session.log(record)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Leave the time of a block out of the time of training."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def _validate(self) -> None:
        """Measure the validation rows; draws no random number and changes nothing that training looks at."""
        facts, settings = self._facts, self._settings
        measured = measure_perplexity(
            self._model,
            self._data.validation,
            batch_size=settings.batch_size,
            masks_documents=settings.masks_documents,
        )
        self._record(
            {"kind": "validation", "step": facts.step, "loss": measured.loss, "perplexity": measured.perplexity}
        )
        if facts.step == 0:
            facts.first_loss = measured.loss
        facts.last_loss = measured.loss
        if not measured.loss >= facts.best_loss:
            facts.best_loss, facts.best_step, facts.validations_since_best = measured.loss, facts.step, 0
            if settings.keep == "best":
                weights = dict(tree_flatten(self._model.trainable_parameters()))
                self._session.checkpoints.save_best(facts.step, weights)
        else:
            facts.validations_since_best += 1
            facts.ended_early = bool(settings.patience) and facts.validations_since_best >= settings.patience

    # --- checkpoints

    def _save(self) -> Path:
        """Write a checkpoint and return its folder."""
        self._settle(0)
        with self._paused():
            self._note_peak()
            facts = self._facts
            arrays = dict(tree_flatten(self._arrays()))
            name = f"{facts.step:06}" + (f"-{facts.rows_done:06}" if facts.rows_done else "")
            told = vars(facts) | {"sizes": self._sizes.state()}
            return self._session.checkpoints.save(name, arrays, told, "".join(line + "\n" for line in self._lines))

    def _arrays(self) -> dict[str, Any]:
        found: dict[str, Any] = {"update": self._step.state[1], "random": list(self._step.state[2])}
        if self._partial is not None:
            found["partial"] = list(self._partial)
        return found

    def unfit(self, checkpoint: Checkpoint) -> str:
        """Return why this run cannot go on from a checkpoint; empty where it can."""
        facts = dict(checkpoint.facts)
        sizes = facts.pop("sizes", None)
        problem = unlike_facts(facts, vars(self._facts)) or unlike_sizes(sizes)
        return problem or unlike_arrays(checkpoint.arrays, self._target(facts["rows_done"]))

    def _target(self, rows_done: int) -> dict[str, Any]:
        """Return what the arrays of a checkpoint are put into, with the sums of an update that was cut short."""
        target = self._arrays()
        if rows_done:
            zero = mx.array(0.0)
            target["partial"] = [zero, zero, tree_map(lambda weight: weight, self._model.trainable_parameters())]
        return target

    def _restore(self, checkpoint: Checkpoint) -> None:
        told = dict(checkpoint.facts)
        self._sizes.restore(told.pop("sizes"))
        vars(self._facts).update(told)
        self._waited_before = self._facts.data_wait_seconds
        self._lines = checkpoint.metrics.splitlines()
        target = self._target(self._facts.rows_done)
        _assign(target, "", checkpoint.arrays)
        self._step.publish()
        put_random_key(target["random"][0])
        if self._facts.rows_done:
            self._partial = Gradients(*target["partial"])
        mx.eval(self._step.state)
        checkpoint.arrays.clear()  # whoever holds the checkpoint must not hold the old weights


def _assign(tree: Any, path: str, arrays: Mapping[str, mx.array]) -> None:
    """Replace every leaf, in place, by the array of its path."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            _assign(value, name, arrays)
        else:
            tree[key] = arrays[name]
