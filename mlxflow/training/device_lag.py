"""How far the host is ahead of the device, and so how long a device holds the buffers that it reads.

The rules are those of MLX 0.32. A CPU's stream takes tasks of single operations, and frees the inputs of each when it
is done. A GPU gets operations in batches: CUDA graphs (`mlx/backend/cuda/device.cpp`) or Metal's command buffers
(`mlx/backend/metal/device.cpp`). It frees the inputs of a whole batch when the batch is done. The host waits when more
than ten tasks or batches are under way (`MAX_ACTIVE_TASKS` in `mlx/transforms.cpp`).
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from mlxflow.ops.graph_trace import Operation

# An operation whose results have fewer bytes is done before the host has sent the next ones; on the CPU
_SHORT_BYTES = 1 << 16


class Buffer:
    """Memory of one or several arrays, freed when neither an array nor an operation under way uses it."""

    __slots__ = ("nbytes", "uses")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.uses = 0


class Sent(NamedTuple):
    """An operation that is sent to the device.

    Attributes:
        operation: what is sent.
        is_view: it gives its input another shape, and computes nothing.
        elements: numbers of its inputs.
        buffers: that it needs until it is done.
    """

    operation: Operation
    is_view: bool
    elements: int
    buffers: list[Buffer]


class Device(Protocol):
    """Operations that were sent to a device."""

    def finish_early_ones(self) -> None:
        """Free the buffers of what is surely done before the next operation is sent."""
        ...

    def send(self, sent: Sent) -> None:
        """Take an operation."""
        ...


Release = Callable[[Buffer], None]


class Ahead(NamedTuple):
    """How far the host sends dispatches ahead of a CPU's stream.

    An operation makes one dispatch or several, and one that frees its inputs; a view makes only that.

    Attributes:
        dispatches: that were sent and may not be done.
        task: so many dispatches are waited for together.
    """

    dispatches: int
    task: int = 1

    def device(self, release: Release) -> Device:
        """Return the stream.

        Args:
            release: called with a buffer once for each operation that is done with it.
        """
        return _Stream(self, release)


class BatchesAhead(NamedTuple):
    """How far the host sends batches of operations ahead of a GPU.

    Attributes:
        operations: a batch that has more is complete.
        elements: so is one whose inputs have so many numbers.
        ahead: complete batches that may not be done.
    """

    operations: int
    elements: int
    ahead: int

    def device(self, release: Release) -> Device:
        """Return the GPU.

        Args:
            release: see `Ahead.device`.
        """
        return _BatchedDevice(self, release)


#: How far the host is ahead of a device.
Lag = Ahead | BatchesAhead


class _UnderWay(NamedTuple):
    """An operation on the CPU.

    Attributes:
        end: dispatches that were sent until then; with the last one of an operation its inputs are freed.
        buffers: see `Sent`.
        is_short: whether it takes the device no time.
    """

    end: int
    buffers: list[Buffer]
    is_short: bool


class _Stream:
    """A stream of the CPU; see `Ahead`."""

    def __init__(self, ahead: Ahead, release: Release) -> None:
        self._ahead = ahead
        self._release = release
        self._count = self._done = 0
        self._under_way: deque[_UnderWay] = deque()

    def finish_early_ones(self) -> None:
        """Free the inputs of what the host waits for, and of what takes no time after that."""
        limit, task = self._ahead
        self._done = max(self._done, self._count // task * task - limit)
        while self._under_way and (self._done >= self._under_way[0].end - 1 or self._under_way[0].is_short):
            sent = self._under_way.popleft()
            self._done = max(self._done, sent.end)
            for buffer in sent.buffers:
                self._release(buffer)

    def send(self, sent: Sent) -> None:
        self._count += 1 + (0 if sent.is_view else _num_dispatches(sent.operation))
        _hold(sent.buffers)
        is_short = sent.is_view or sum(value.nbytes for value in sent.operation.outputs) < _SHORT_BYTES
        self._under_way.append(_UnderWay(self._count, sent.buffers, is_short))


def _num_dispatches(operation: Operation) -> int:
    """Return how many kernels an operation dispatches on the CPU: a concatenation copies each of its inputs."""
    several = {"Concatenate": len(operation.inputs), "AddMM": 2, "SliceUpdate": 2}
    return several.get(operation.name, 1)


class _BatchedDevice:
    """A GPU; see `BatchesAhead`."""

    def __init__(self, batches: BatchesAhead, release: Release) -> None:
        self._limits = batches
        self._release = release
        self._operations = self._elements = 0
        self._open: list[Buffer] = []
        self._complete: deque[list[Buffer]] = deque()

    def finish_early_ones(self) -> None:
        while len(self._complete) > self._limits.ahead:
            for buffer in self._complete.popleft():
                self._release(buffer)

    def send(self, sent: Sent) -> None:
        _hold(sent.buffers)
        self._open += sent.buffers
        if not sent.is_view:
            self._operations += _num_nodes(sent.operation)
            self._elements += sent.elements
        if self._operations > self._limits.operations or self._elements >= self._limits.elements:
            self._complete.append(self._open)
            self._operations, self._elements, self._open = 0, 0, []


def _num_nodes(operation: Operation) -> int:
    """Return how many nodes of a CUDA graph an operation has: the copies of a concatenation are joined by another."""
    several = {"Concatenate": len(operation.inputs) + 1, "SliceUpdate": 2, "Scatter": 2}
    return several.get(operation.name, 1)


def _hold(buffers: Iterable[Buffer]) -> None:
    for buffer in buffers:
        buffer.uses += 1
