"""The batches of a training run, from a loader that is opened again when the rows of an update change."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.data.loader import DeviceBatch, Loader
from mlxflow.data.token_file import Rows
from mlxflow.training.run_state import RunState

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrainingData(NamedTuple):
    """The rows that a training run reads.

    Attributes:
        open_loader: takes rows of a batch, rows used so far, and the positions in a batch of this process's rows, None
            for all; returns the loader that continues after the used rows.
        validation: rows measured before the first step, every `eval_every` steps and after the last.
    """

    open_loader: "Callable[[int, int, NDArray[np.int64] | None], Loader]"
    validation: Rows


class Batches:
    """The batches of a training run, one for each update.

    Args:
        data: the rows.
        state: of the run; its time of waiting for data is kept up to date.

    Attributes:
        cursor: rows of the stream that are used when the update of the last batch is done.
    """

    def __init__(self, data: TrainingData, state: RunState) -> None:
        self.cursor = 0
        self._data = data
        self._state = state
        self._loader: Loader | None = None
        self._layout: tuple[int, tuple[int, ...] | None] = (0, None)
        self._waited_before = 0.0  # in closed loaders and in earlier runs

    def take(self, num_rows: int, own: "NDArray[np.int64] | None" = None) -> DeviceBatch:
        """Return the rows of the next update.

        Args:
            num_rows: of the update.
            own: positions in it of the rows that this process reads; None for all.
        """
        layout = (num_rows, None if own is None else tuple(own.tolist()))
        if self._loader is None or layout != self._layout:
            self.close()
            self._loader = self._data.open_loader(num_rows, self._state.cursor, own).__enter__()
            self._layout = layout
        batch = next(self._loader)
        self.cursor = self._loader.cursor
        self._state.data_wait_seconds = self._waited_before + self._loader.waited_seconds
        return batch

    def close(self) -> None:
        """End the loader's threads; the next batch is then the one after the rows that the run has used."""
        if self._loader is not None:
            self._waited_before += self._loader.waited_seconds
            self._loader.__exit__(None, None, None)
            self._loader = None

    def restore(self) -> None:
        """Continue the time of waiting of a restored state."""
        self._waited_before = self._state.data_wait_seconds
