"""Peak memory of a graph of operations from their shapes alone, by MLX's rules for order and freeing.

The rules are those of MLX 0.32. The order is the reverse of a breadth-first search of bounded width
(`mlx/transforms.cpp`). Views share a buffer. An operation may write into an input that nothing else needs. A buffer is
freed when the device, which the host is ahead of, is done: on the CPU with an operation, on a GPU with a batch of them
(`device_lag.py`).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mlxflow.ops.graph_trace import CUSTOM, Operation
from mlxflow.training.device_lag import Buffer, Lag, Sent
from mlxflow.training.graph_fusion import ELEMENTWISE, Graph

_VIEWS = frozenset(("Depends", "ExpandDims", "Slice", "Split", "Squeeze", "View", CUSTOM))
_RESHAPES = frozenset(("Flatten", "Reshape", "Unflatten"))
_SCATTERED = frozenset(("AsStrided", "Broadcast", "BroadcastAxes", "Transpose"))
# Operations beside elementwise ones that may write into their first input
_WRITE_IN_PLACE = frozenset(
    ("Compiled", "Scan", "Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate", "Softmax")
)

# The bound of MLX's order
_MAX_WIDTH = 20


def scheduled(graph: Graph) -> list[Operation]:
    """Return the operations in the order in which MLX evaluates them."""
    makers = {value.name: operation for operation in graph.operations for value in operation.outputs}
    end = Operation("", "", tuple(graph.results), ())
    uses = Counter(_first(makers, name) for one in (end, *graph.operations) for name in one.inputs if name in makers)
    tape = [end]
    stack: list[tuple[Operation, int]] = []
    place = 0
    while place < len(tape) or stack:
        if place < len(tape):
            operation, begin = tape[place], 0
            place += 1
        else:
            operation, begin = stack.pop()
        names = [name for name in operation.inputs if name in makers]
        for number, name in enumerate(names[begin:], begin):
            if len(tape) - place >= _MAX_WIDTH:
                stack.append((operation, number))
                break
            key = _first(makers, name)
            uses[key] -= 1
            if not uses[key]:
                tape.append(makers[name])
    return tape[:0:-1]


def _first(makers: Mapping[str, Operation], name: str) -> str:
    return makers[name].outputs[0].name


class _Memory:
    """The buffers of a graph's arrays while its operations run.

    Args:
        held_bytes: of arrays that stay.
    """

    def __init__(self, held_bytes: int) -> None:
        self.of: dict[str, Buffer] = {}
        self.peak = self._held = held_bytes

    def allocate(self, nbytes: int) -> Buffer:
        self._held += nbytes
        self.peak = max(self.peak, self._held)
        return Buffer(nbytes)

    def bind(self, name: str, buffer: Buffer) -> None:
        self.of[name] = buffer
        buffer.uses += 1

    def bind_inputs(self, changed: Mapping[str, tuple[str, int]]) -> None:
        """Take inputs that are freed after their last use, see `peak_bytes`."""
        first = {name: self.allocate(size) for name, size in dict(changed.values()).items()}
        for name, (buffer_name, _) in changed.items():
            self.bind(name, first[buffer_name])

    def release(self, buffer: Buffer) -> None:
        buffer.uses -= 1
        if not buffer.uses:
            self._held -= buffer.nbytes

    def having(self, names: Iterable[str]) -> list[str]:
        """Return the names that have a buffer, without repetitions: constants have none."""
        return [name for name in dict.fromkeys(names) if name in self.of]


def peak_bytes(graphs: Sequence[Graph], held_bytes: int, changed: Mapping[str, tuple[str, int]], *, lag: Lag) -> int:
    """Return the peak of the memory of arrays.

    Args:
        graphs: of compiled functions, evaluated one after the other; the results of the last one are kept.
        held_bytes: of inputs that stay.
        changed: other inputs, freed after their last use: the name of their buffer, which several may share, and its
            bytes.
        lag: how far the host is ahead of the device.
    """
    memory = _Memory(held_bytes)
    memory.bind_inputs(changed)
    device = lag.device(memory.release)
    order = [operation for graph in graphs for operation in scheduled(graph)]
    sizes = {value.name: value.size for graph in graphs for value in graph.inputs}
    sizes |= {value.name: value.size for operation in order for value in operation.outputs}
    uses = Counter(name for operation in order for name in set(operation.inputs))
    uses.update(graphs[-1].results)  # never used up
    scattered: set[str] = set()
    for operation in order:
        device.finish_early_ones()
        inputs = memory.having(operation.inputs)
        is_view = _is_view(operation, scattered)
        given = [memory.of[name] for name in inputs]
        if is_view:
            _bind_view(operation, memory, scattered)
        else:
            _bind_results(operation, memory, [name for name in inputs if uses[name] == 1])
        elements = sum(sizes.get(name, 1) for name in operation.inputs)
        device.send(Sent(operation, is_view, elements, _held(operation, given, memory)))
        _release_unused(operation, uses, memory)
    return memory.peak


def _release_unused(operation: Operation, uses: Counter[str], memory: _Memory) -> None:
    """Count an operation's uses of its inputs down, and release what nothing else needs."""
    for name in set(operation.inputs):
        uses[name] -= 1
    for name in (*operation.inputs, *[value.name for value in operation.outputs]):
        if not uses[name] and name in memory.of:
            memory.release(memory.of.pop(name))


def _held(operation: Operation, given: list[Buffer], memory: _Memory) -> list[Buffer]:
    """Return the buffers that are held until the device is done: those of inputs and of results beside the first.

    That of the first result is none of them, whether it is shared by a view or was taken over.
    """
    results = [memory.of.get(value.name) for value in operation.outputs]
    everything = dict.fromkeys((*given, *results[1:]))
    return [buffer for buffer in everything if buffer is not None and buffer is not results[0]]


def _bind_view(operation: Operation, memory: _Memory, scattered: set[str]) -> None:
    """Let the results share the buffer of the input, if it has one: constants have none."""
    sources = operation.inputs[-len(operation.outputs) :] if operation.name == CUSTOM else operation.inputs
    for value, source in zip(operation.outputs, itertools.cycle(sources[: len(operation.outputs)]), strict=False):
        if source in memory.of:
            memory.bind(value.name, memory.of[source])
        cuts_rows = operation.name in ("Slice", "Split") and len(value.shape) > 1
        if operation.name in _SCATTERED or source in scattered or cuts_rows:
            scattered.add(value.name)


def _bind_results(operation: Operation, memory: _Memory, ending: Iterable[str]) -> None:
    """Give the results buffers: those of inputs that nothing else needs, or new ones."""
    may_reuse = operation.name in ELEMENTWISE or operation.name in _WRITE_IN_PLACE
    free = [memory.of[name] for name in ending if may_reuse and memory.of[name].uses == 1]
    for value in operation.outputs:
        same = next((buffer for buffer in free if buffer.nbytes == value.nbytes), None)
        if same is not None:
            free.remove(same)
        memory.bind(value.name, same or memory.allocate(value.nbytes))


def _is_view(operation: Operation, scattered: set[str]) -> bool:
    if operation.name in _RESHAPES:
        return operation.inputs[0] not in scattered
    return operation.name in _VIEWS or operation.name in _SCATTERED
