"""Counts and losses of a training run, and its result."""

from typing import NamedTuple

import mlx.core as mx


class Result(NamedTuple):
    """The result of a training run; its seconds exclude validations and checkpoints.

    Attributes:
        steps: updates; fewer than planned where training ended early.
        rows: of the training file that the updates summed; a row counts each time.
        best_step: of the lowest validation loss.
        validations_since_best: validations after the one of the lowest loss.
        skipped_steps: updates without a finite loss or gradient.
        rank_waited_seconds: of each rank of a distributed run since its last start; empty for a single process.
        memory_limit_bytes: that `peak_memory_bytes` should not exceed.
    """

    steps: int
    rows: int
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
    validations_since_best: int
    skipped_steps: int
    peak_memory_bytes: int
    rank_waited_seconds: tuple[float, ...] = ()
    memory_limit_bytes: int = 0


class RunState:
    """Counts of a training run: numbers by name, saved in a checkpoint."""

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

    def note_peak(self) -> None:
        """Record MLX's peak memory since it was last reset."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, mx.get_peak_memory(), mx.get_active_memory())

    def tokens_per_second(self) -> float:
        """Return tokens per second of wall-clock time, without updates that compiled something."""
        tokens, seconds = self.tokens - self.compile_tokens, self.seconds - self.compile_seconds
        if tokens <= 0 or seconds <= 0:
            tokens, seconds = self.tokens, self.seconds
        return tokens / seconds if seconds > 0 else 0.0

    def result(self) -> Result:
        """Return the result of the run."""
        return Result(
            steps=self.step,
            rows=self.cursor,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.tokens_per_second(),
            compile_seconds=self.compile_seconds,
            data_wait_seconds=self.data_wait_seconds,
            device_wait_seconds=self.device_wait_seconds,
            first_validation_loss=self.first_loss,
            last_validation_loss=self.last_loss,
            best_validation_loss=self.best_loss,
            best_step=self.best_step,
            validations_since_best=self.validations_since_best,
            skipped_steps=self.skipped_steps,
            peak_memory_bytes=self.peak_memory_bytes,
        )
