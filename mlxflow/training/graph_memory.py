"""Peak memory of a graph of operations from their shapes alone, by MLX's rules for order, fusion and freeing.

The rules are those of MLX 0.32. Equal operations are merged and elementwise ones fused (`mlx/compile.cpp`). The order
is the reverse of a breadth-first search of bounded width (`mlx/transforms.cpp`). Views share a buffer. An operation may
write into an input that nothing else needs. A buffer is freed when the device, which the host is ahead of, is done.
"""

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mlxflow.ops.graph_trace import CUSTOM, Operation, Traced, in_order

_UNARY = (
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType BitwiseInvert Ceil Conjugate Cos Cosh Erf ErfInv Exp "
    "Expm1 Floor Imag Log Log1p Log2 Log10 LogicalNot Negative Real Round Rsqrt Sigmoid Sign Sin Sinh Sqrt Square Tan "
    "Tanh"
)
_BINARY = (
    "Add ArcTan2 BitwiseBinary Divide Equal Greater GreaterEqual Less LessEqual LogAddExp "
    "LogicalAnd LogicalOr Maximum Minimum Multiply NaNEqual NotEqual Power Remainder Subtract"
)
_ELEMENTWISE = frozenset((_UNARY + " " + _BINARY + " Select").split())
_NO_OPERATION = frozenset(("Copy", "StopGradient"))
_VIEWS = frozenset(("Depends", "ExpandDims", "Slice", "Split", "Squeeze", "View", CUSTOM))
_RESHAPES = frozenset(("Flatten", "Reshape", "Unflatten"))
_SCATTERED = frozenset(("AsStrided", "Broadcast", "BroadcastAxes", "Transpose"))
# Operations beside elementwise ones that may write into their first input
_WRITE_IN_PLACE = frozenset(
    ("Compiled", "Scan", "Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate", "Softmax")
)

# Bounds of MLX's fusion and order
_MAX_DEPTH, _MAX_INPUTS, _MAX_WIDTH = 11, 24, 20


class Graph(NamedTuple):
    """Operations in an order in which they can run, and the names of the values that are kept."""

    operations: Sequence[Operation]
    results: Sequence[str]


def compiled(traced: Traced) -> Graph:
    """Return the graph that `mx.compile` returns for a function's; its results are in the same order."""
    return _fused(_simplified(Graph(traced.operations, [value.name for value in traced.outputs])))


def _simplified(graph: Graph) -> Graph:
    """Return a graph with equal operations merged, without copies and without operations that nothing needs."""
    renamed: dict[str, str] = {}
    known: dict[tuple[str, str, tuple[str, ...]], Operation] = {}
    kept = []
    for operation in graph.operations:
        inputs = tuple(renamed.get(name, name) for name in operation.inputs)
        if operation.name in _NO_OPERATION:
            renamed[operation.outputs[0].name] = inputs[0]
            continue
        key = (operation.name, operation.arguments, inputs)
        if key in known:
            pairs = zip(operation.outputs, known[key].outputs, strict=True)
            renamed |= {value.name: same.name for value, same in pairs}
            continue
        known[key] = operation._replace(inputs=inputs)
        kept.append(known[key])
    results = [renamed.get(name, name) for name in graph.results]
    return Graph(_needed(kept, results), results)


def _needed(operations: Sequence[Operation], results: Iterable[str]) -> list[Operation]:
    needed, kept = set(results), []
    for operation in reversed(operations):
        if any(value.name in needed for value in operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def _fused(graph: Graph) -> Graph:
    """Return a graph in which groups of elementwise operations are one operation, as `mx.compile` makes them."""
    makers = {value.name: operation for operation in graph.operations for value in operation.outputs}
    users: dict[str, list[Operation]] = defaultdict(list)
    for operation in graph.operations:
        for name in operation.inputs:
            users[name].append(operation)
    results, done, made = set(graph.results), set[str](), dict[str, Operation]()
    for operation in reversed(graph.operations):
        name = operation.outputs[0].name
        if name in done or operation.name not in _ELEMENTWISE:
            continue
        group = _group(operation, makers, users, results)
        if len(group) > 1:
            done.update(member for member in group if makers[member].name != "Broadcast")
            made[name] = _compiled([makers[member] for member in group], results, users, set(group))
    fresh = [
        made.get(one.outputs[0].name, one)
        for one in graph.operations
        if one.outputs[0].name in made or one.outputs[0].name not in done
    ]
    return Graph(in_order(fresh, graph.results), graph.results)


def _group(
    end: Operation, makers: Mapping[str, Operation], users: Mapping[str, list[Operation]], results: set[str]
) -> list[str]:
    """Return the names of the values that are fused with the last one; broadcasts may be computed twice."""
    shape = end.outputs[0].shape
    group: dict[str, None] = {}
    inputs: set[str] = set()

    def visit(name: str, depth: int) -> None:
        if name in group:
            return
        maker = makers.get(name)
        is_broadcast = maker is not None and maker.name == "Broadcast"
        if (
            depth >= _MAX_DEPTH
            or maker is None
            or not (is_broadcast or maker.name in _ELEMENTWISE)
            or (name in results and maker.outputs[0].shape != shape)
        ):
            inputs.add(name)
            return
        alone = all(user.outputs[0].name in group for user in users[name])
        if depth and not alone and not is_broadcast:
            inputs.add(name)
            return
        inputs.discard(name)
        if len(inputs) >= _MAX_INPUTS:
            return
        group[name] = None
        for one in maker.inputs:
            visit(one, depth + 1)

    visit(end.outputs[0].name, 0)
    return list(group)


def _compiled(
    members: Sequence[Operation], results: set[str], users: Mapping[str, list[Operation]], group: set[str]
) -> Operation:
    end = members[0].outputs[0]
    others = [one.outputs[0] for one in members[1:] if one.outputs[0].name in results]
    inputs = dict.fromkeys(name for one in members for name in one.inputs if name not in group)
    return Operation("Compiled", "", tuple(inputs), (end, *others))


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


class _Buffer:
    """Memory of one or several arrays, freed when neither an array nor an operation under way uses it."""

    __slots__ = ("nbytes", "uses")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.uses = 0


class _Memory:
    """The buffers of a graph's arrays while its operations run.

    Args:
        held_bytes: of arrays that stay.
    """

    def __init__(self, held_bytes: int) -> None:
        self.of: dict[str, _Buffer] = {}
        self.peak = self._held = held_bytes

    def allocate(self, nbytes: int) -> _Buffer:
        self._held += nbytes
        self.peak = max(self.peak, self._held)
        return _Buffer(nbytes)

    def bind(self, name: str, buffer: _Buffer) -> None:
        self.of[name] = buffer
        buffer.uses += 1

    def bind_inputs(self, changed: Mapping[str, tuple[str, int]]) -> None:
        """Take inputs that are freed after their last use, see `peak_bytes`."""
        first = {name: self.allocate(size) for name, size in dict(changed.values()).items()}
        for name, (buffer_name, _) in changed.items():
            self.bind(name, first[buffer_name])

    def release(self, buffer: _Buffer) -> None:
        buffer.uses -= 1
        if not buffer.uses:
            self._held -= buffer.nbytes

    def having(self, names: Iterable[str]) -> list[str]:
        """Return the names that have a buffer, without repetitions: constants have none."""
        return [name for name in dict.fromkeys(names) if name in self.of]


class _Device:
    """Operations that were sent to the device: it needs their inputs until it is done.

    Args:
        memory: of the arrays.
        lag: see `peak_bytes`.
    """

    def __init__(self, memory: _Memory, lag: int) -> None:
        self._memory = memory
        self._lag = lag
        self._count = 0
        self._under_way: deque[tuple[int, list[_Buffer]]] = deque()

    def finish_early_ones(self) -> None:
        while self._under_way and self._under_way[0][0] <= self._count - self._lag:
            for buffer in self._under_way.popleft()[1]:
                self._memory.release(buffer)

    def send(self, inputs: list[_Buffer], dispatches: int) -> None:
        self._count += dispatches
        for buffer in inputs:
            buffer.uses += 1
        self._under_way.append((self._count, inputs))


def peak_bytes(graph: Graph, held_bytes: int, changed: Mapping[str, tuple[str, int]], *, lag: int) -> int:
    """Return the peak of the memory of a graph's arrays.

    Args:
        graph: of compiled functions.
        held_bytes: of inputs that stay.
        changed: other inputs, freed after their last use: the name of their buffer, which several may share, and its
            bytes.
        lag: dispatches that the host is ahead of the device. An operation makes one or several, and one that frees its
            inputs; a view makes only that.
    """
    memory = _Memory(held_bytes)
    memory.bind_inputs(changed)
    device = _Device(memory, lag)
    order = scheduled(graph)
    uses = Counter(name for operation in order for name in set(operation.inputs))
    uses.update(graph.results)  # never used up
    scattered: set[str] = set()
    for operation in order:
        device.finish_early_ones()
        inputs = memory.having(operation.inputs)
        used = list(dict.fromkeys(memory.of[name] for name in inputs))
        is_view = _is_view(operation, scattered)
        if is_view:
            _bind_view(operation, memory, scattered)
        else:
            taken = _bind_results(operation, memory, [name for name in inputs if uses[name] == 1])
            used = [buffer for buffer in used if buffer not in taken]
        device.send(used, 1 + (0 if is_view else _num_dispatches(operation)))
        uses.subtract(set(operation.inputs))
        for name in memory.having((*operation.inputs, *(value.name for value in operation.outputs))):
            if not uses[name]:
                memory.release(memory.of.pop(name))
    return memory.peak


def _bind_view(operation: Operation, memory: _Memory, scattered: set[str]) -> None:
    """Let the results share the buffer of the input, if it has one: constants have none."""
    sources = operation.inputs[-len(operation.outputs) :] if operation.name == CUSTOM else operation.inputs
    for value, source in zip(operation.outputs, itertools.cycle(sources[: len(operation.outputs)]), strict=False):
        if source in memory.of:
            memory.bind(value.name, memory.of[source])
        cuts_rows = operation.name in ("Slice", "Split") and len(value.shape) > 1
        if operation.name in _SCATTERED or source in scattered or cuts_rows:
            scattered.add(value.name)


def _bind_results(operation: Operation, memory: _Memory, ending: Iterable[str]) -> list[_Buffer]:
    """Give the results buffers; return those that were taken over from inputs that nothing else needs."""
    may_reuse = operation.name in _ELEMENTWISE or operation.name in _WRITE_IN_PLACE
    free = [memory.of[name] for name in ending if may_reuse and memory.of[name].uses == 1]
    taken = []
    for value in operation.outputs:
        same = next((buffer for buffer in free if buffer.nbytes == value.nbytes), None)
        if same is not None:
            free.remove(same)
            taken.append(same)
        memory.bind(value.name, same or memory.allocate(value.nbytes))
    return taken


def _num_dispatches(operation: Operation) -> int:
    """Return how many kernels an operation dispatches on the CPU: a concatenation copies each of its inputs."""
    several = {"Concatenate": len(operation.inputs), "AddMM": 2, "SliceUpdate": 2}
    return several.get(operation.name, 1)


def _is_view(operation: Operation, scattered: set[str]) -> bool:
    if operation.name in _RESHAPES:
        return operation.inputs[0] not in scattered
    return operation.name in _VIEWS or operation.name in _SCATTERED
