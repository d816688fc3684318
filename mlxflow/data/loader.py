"""The training data loader: shuffled batches, prefetched to the device.

Worker threads gather rows from the mapped file, a few batches ahead; the next batch is already on the device. MLX's
streams belong to a thread, so workers pass numpy arrays and the caller's thread converts them to MLX arrays.
"""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import mlx.core as mx
import numpy as np

from mlxflow.data.row_widths import width_of
from mlxflow.data.shuffle import Permutation
from mlxflow.data.token_file import Batch, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The order is computed for this many rows at a time: numpy's cost per call is the same for one row.
_ORDERED_ROWS = 4096


class DeviceBatch(NamedTuple):
    """A batch on the device, the input of a training step.

    Attributes:
        tokens: (B, L + 1) ids.
        marks: (B, L + 1); see `Batch`.
        targets: tokens that the model learns to predict.
        lengths: (B,) of each row the positions up to its last target; see `Batch`.
        extras: further arrays of the rows, (B, L, ...) each, that the loss takes.
    """

    tokens: mx.array
    marks: mx.array
    targets: int
    lengths: "NDArray[np.int64]"
    extras: tuple[mx.array, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return a batch in main memory as one on the device."""
        extras = tuple(map(mx.array, batch.extras))
        return cls(mx.array(batch.tokens), mx.array(batch.marks), batch.targets, batch.lengths, extras)

    def width(self, begin: int, end: int) -> int:
        """Return the positions of some rows that a forward pass computes; see `row_widths`."""
        return width_of(self.lengths[begin:end], self.tokens.shape[1] - 1)

    def part(self, begin: int, end: int, *, width: int | None = None) -> tuple[mx.array, ...]:
        """Return tokens, marks and further arrays of some rows: what a step computes with.

        Args:
            begin: the first row.
            end: one past the last.
            width: positions; None for those of `width`.
        """
        width = self.width(begin, end) if width is None else width
        arrays = [one[begin:end, : width + 1] for one in (self.tokens, self.marks)]
        return (*arrays, *(one[begin:end, :width] for one in self.extras))


class Order:
    """The order of rows in an endless stream: every epoch is another permutation of all rows.

    Args:
        count: of rows, R.
        seed: determines the order together with the epoch.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._known: dict[int, NDArray[np.int64]] = {}

    def rows(self, begin: int, count: int) -> "NDArray[np.int64]":
        """Return (count,) the row numbers at positions from `begin` on, in the same time for any position."""
        blocks = range(begin // _ORDERED_ROWS, (begin + count - 1) // _ORDERED_ROWS + 1)
        for number in [number for number in self._known if number < blocks[0] - 1]:
            self._known.pop(number, None)
        blocks_of_rows = [self._block(number) for number in blocks]
        whole = blocks_of_rows[0] if len(blocks_of_rows) == 1 else np.concatenate(blocks_of_rows)
        first = begin - blocks[0] * _ORDERED_ROWS
        return whole[first : first + count]

    def _block(self, number: int) -> "NDArray[np.int64]":
        known = self._known.get(number)
        if known is None:
            places = np.arange(number * _ORDERED_ROWS, (number + 1) * _ORDERED_ROWS)
            epochs = places // self._count
            known = np.empty(len(places), np.int64)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                mine = epochs == epoch
                permutation = Permutation(self._count, seed=self._seed, epoch=epoch)
                known[mine] = permutation(places[mine] - epoch * self._count)
            self._known[number] = known
        return known


def name_by_number(rows: "NDArray[np.int64]") -> str:
    """Return the numbers of rows as text, for a message."""
    return f"rows {rows.tolist()}"


class Loader(Iterator[DeviceBatch]):
    """An endless iterator of prefetched batches, used in a `with` block, which ends its threads.

    Args:
        rows: mapped into memory or not.
        batch_size: rows per batch, B.
        seed: of the order; see `Order`.
        workers: threads that gather rows.
        prefetch_batches: maximum number of prefetched batches.
        cursor: number of rows of the stream that were already used; resuming takes the same time from any position.
        own: (B',) positions, within a batch, of the rows that this process reads, in this order; None for all. In a
            distributed run every position belongs to one rank.
        name_rows: returns the documents in rows as text, for error messages.

    Attributes:
        cursor: number of rows of the stream in the batches so far, those of other ranks included; the only state for
            a checkpoint.
        waited_seconds: total time that the caller waited for rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        prefetch_batches: int,
        cursor: int = 0,
        own: "NDArray[np.int64] | None" = None,
        name_rows: Callable[["NDArray[np.int64]"], str] = name_by_number,
    ) -> None:
        self.cursor = cursor
        self.waited_seconds = 0.0
        self._rows = rows
        self._batch_size = batch_size
        self._first = cursor
        self._own = own
        self._name_rows = name_rows
        self._order = Order(rows.num_rows, seed=seed)
        self._order_lock = threading.Lock()
        self._state = threading.Lock()
        self._room, self._filled = threading.Condition(self._state), threading.Condition(self._state)
        self._prefetch = prefetch_batches
        self._claimed = self._taken = 0  # batches
        self._ready: dict[int, Batch | Exception] = {}
        self._ended = False
        self._next: DeviceBatch | None = None
        self._workers = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(workers)]

    def __enter__(self) -> Self:
        _read_ahead(self._rows)
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._state:
            self._ended = True
            self._room.notify_all()
        for worker in self._workers:
            worker.join()

    def __next__(self) -> DeviceBatch:
        """Return the next batch, and move the following one to the device if it is ready.

        Raises:
            OSError: a worker could not read the rows.
        """
        batch = self._next or DeviceBatch.of(self._take())
        self._next = None
        self.cursor += self._batch_size
        with self._state:
            is_ready = self._taken in self._ready
        if is_ready:
            self._next = DeviceBatch.of(self._take())
        return batch

    def _take(self) -> Batch:
        with self._state:
            number = self._taken
            if number not in self._ready:
                begin = time.perf_counter()
                self._filled.wait_for(lambda: number in self._ready)
                self.waited_seconds += time.perf_counter() - begin
            batch = self._ready.pop(number)
            self._taken += 1
            self._room.notify()
        if isinstance(batch, Exception):
            raise batch
        return batch

    def _work(self) -> None:
        while True:
            with self._state:
                self._room.wait_for(lambda: self._ended or self._claimed < self._taken + self._prefetch)
                if self._ended:
                    return
                number = self._claimed
                self._claimed += 1
            gathered = self._gather(number)
            with self._state:
                self._ready[number] = gathered
                self._filled.notify()

    def _gather(self, number: int) -> Batch | Exception:
        with self._order_lock:
            indices = self._order.rows(self._first + number * self._batch_size, self._batch_size)
        if self._own is not None:
            indices = indices[self._own]
        try:
            return self._rows.take(indices)
        except Exception as error:  # raised again in the caller's thread
            error.add_note(f"while {self._name_rows(indices)} were gathered")
            return error


def _read_ahead(rows: Rows) -> None:
    """Ask the system to read the mapped file sequentially now: a cold disk is slow at random rows."""
    import mmap

    import psutil

    if rows.tokens.nbytes + rows.marks.nbytes > psutil.virtual_memory().available // 2:
        return
    for array in (rows.tokens, rows.marks):
        mapped = getattr(array, "_mmap", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
