"""Records of a training run for `metrics.jsonl`, and its clock, which is paused in validations and checkpoints."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxflow.training.batch_size import BatchSizes
from mlxflow.training.run_state import RunState

#: Called with one record for each log line; the key "kind" is "train", "validation" or "batch_size".
Log = Callable[[dict[str, Any]], None]


class Recorder:
    """Writes the records of a training run.

    Args:
        state: of the run; its seconds and losses are kept up to date.
        sizes: the batch sizes.
        log: called with each record.

    Attributes:
        rank_waited_seconds: of each rank of a distributed run, how long it waited for others and for its device.
        lines: all records so far, as JSON.
        begin: when the run began, in seconds of a clock without the paused time.
    """

    def __init__(self, state: RunState, sizes: BatchSizes, log: Log) -> None:
        self._state = state
        self._sizes = sizes
        self._log = log
        self.rank_waited_seconds: list[float] = []
        self.lines: list[str] = []
        self.begin = self._started = time.perf_counter()
        self._is_paused = False

    def train(self, step: int, norm: float, rate: float) -> None:
        """Record an update and the mean loss since the last record.

        Args:
            step: number of the update.
            norm: of its gradient, a scalar.
            rate: its learning rate, a scalar.
        """
        state = self._state
        state.seconds = time.perf_counter() - self.begin
        loss = state.window_loss / state.window_targets if state.window_targets else float("nan")
        state.window_loss, state.window_targets = 0.0, 0
        state.note_peak()
        self.write(
            {
                "kind": "train",
                "step": step,
                "loss": loss if loss == loss else None,
                "gradient_norm": norm if abs(norm) < float("inf") else None,
                "learning_rate": rate,
                "tokens": state.tokens,
                "tokens_per_second": state.tokens_per_second(),
                "batch_size": self._sizes.size,
                "skipped_steps": state.skipped_steps,
                "seconds": state.seconds,
                "data_wait_seconds": state.data_wait_seconds,
                "device_wait_seconds": state.device_wait_seconds,
                "compile_seconds": state.compile_seconds,
                "active_memory_bytes": mx.get_active_memory(),
                "cache_memory_bytes": mx.get_cache_memory(),
                "peak_memory_bytes": state.peak_memory_bytes,
                **self._ranks(),
            }
        )

    def _ranks(self) -> dict[str, Any]:
        """Return what a distributed run records in addition: waiting, and the time in which that was."""
        if not self.rank_waited_seconds:
            return {}
        elapsed = time.perf_counter() - self._started
        return {"rank_waited_seconds": self.rank_waited_seconds, "elapsed_seconds": elapsed}

    def has_validation(self, step: int) -> bool:
        """Return whether the last recorded validation is that of a step."""
        records = (json.loads(line) for line in reversed(self.lines))
        return next((record["step"] for record in records if record["kind"] == "validation"), None) == step

    def write(self, record: dict[str, Any]) -> None:
        """Log a record, and keep it for checkpoints."""
        self.lines.append(json.dumps(record))
        self._log(record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a block from the training time, which a checkpoint that is saved in it has until then."""
        if self._is_paused:
            yield
            return
        begin = time.perf_counter()
        self._state.seconds = begin - self.begin
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.begin += time.perf_counter() - begin
