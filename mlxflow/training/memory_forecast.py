"""What the peak memory of a training will be, from the shapes of its arrays, before any step: nothing is computed.

A step and a validation (`validation_memory.py`) count. They are traced (`ops/graph_trace.py`), and their allocations
are followed in MLX's order (`graph_memory.py`).
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.data.token_file import Rows
from mlxflow.device import compute_device
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.ops.graph_trace import Traced, Value, trace
from mlxflow.ops.overrides import replaced_in_evaluation
from mlxflow.training import build, graph_memory
from mlxflow.training.device_lag import Ahead, BatchesAhead, Lag
from mlxflow.training.graph_fusion import Graph, compiled
from mlxflow.training.memory_advice import memory_advice
from mlxflow.training.precompile import restored
from mlxflow.training.step import Step
from mlxflow.training.validation_memory import validation_peak_bytes

# MLX waits for the CPU when an eleventh task of ten dispatches is sent, and for a GPU when an eleventh batch is
_MOST_TASKS = 10


def _lags() -> tuple[Lag, Lag]:
    """Return how far the host is ahead of the device at the most, and if it waits to keep within MLX's memory limit.

    Above that limit it waits for all that MLX counts: on the CPU the dispatches of a task may not be done, on a GPU the
    batch that was not complete. The CPU's figures were compared with measured peaks, and CUDA's with those of one kind
    of device; Metal's are from MLX's source.
    """
    if mx.default_device() == mx.cpu:
        return Ahead(_MOST_TASKS * 10, 10), Ahead(10)
    operations, elements = compute_device.batch_limits()
    return BatchesAhead(operations, elements, _MOST_TASKS), BatchesAhead(operations, elements, 0)


class MemoryForecast(NamedTuple):
    """The predicted memory of a training.

    Attributes:
        peak_bytes: of MLX's arrays, with weights and the optimizer's state.
        tokens: of a pass.
        validation_bytes: the peak in a validation alone.
        waiting_bytes: the peak with a host that waits for the device, as it does to stay within the memory limit; 0 if
            that is not known.
    """

    peak_bytes: int
    tokens: int
    validation_bytes: int = 0
    waiting_bytes: int = 0

    @property
    def least_bytes(self) -> int:
        """The memory that a training needs, with a host that waits."""
        return self.waiting_bytes or self.peak_bytes

    @property
    def is_of_validation(self) -> bool:
        """Whether a validation takes more than a step."""
        return self.validation_bytes >= self.peak_bytes

    def line(self, limit_bytes: int, *, advice: str) -> str:
        """Return whether a training fits into the memory, in words.

        Args:
            limit_bytes: memory limit of MLX.
            advice: what to do if it does not.
        """
        step = f"a step with passes of {self.tokens:,} tokens"
        where = f"a validation, which takes more than {step}" if self.is_of_validation else step
        peak = f"about {show_bytes(self.peak_bytes)} in {where}"
        if self.peak_bytes <= limit_bytes:
            return f"{peak}: fits into the {show_bytes(limit_bytes)} allowed"
        if self.least_bytes <= limit_bytes:
            waiting = f"{show_bytes(self.least_bytes)} if the host waits for the device"
            return f"{peak}, {waiting}: fits into the {show_bytes(limit_bytes)} allowed, more slowly"
        return f"{peak}: does not fit into the {show_bytes(limit_bytes)} allowed. {advice}"

    def advice(self, subject: build.Subject, rows: Rows) -> str:
        """Return what to do if it does not fit, a sentence.

        Args:
            subject: of the forecast.
            rows: see there.
        """
        return memory_advice(subject.settings, subject.names, rows=rows.num_rows, in_validation=self.is_of_validation)


def forecast_memory(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> MemoryForecast:
    """Return the predicted memory of a training: of its steps, or of a validation if that takes more.

    Args:
        subject: the model, whose weights need not be evaluated, and its settings; as before afterwards.
        kernels: in use.
        rows: of one pass.

    Raises:
        ValueError: the model uses an operation that cannot be traced.
    """
    with _without_collections(), _traceable(kernels):
        return _forecast(subject, kernels, rows)


def _forecast(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> MemoryForecast:
    with restored(subject.model), build.ready_step(subject, kernels) as step:
        graphs, held, changed = _graphs_of(step, subject, rows)
    lags = _lags()
    with replaced_in_evaluation(build.overrides_of(subject.settings, kernels)):
        of_validation = validation_peak_bytes(
            subject.model,
            rows,
            held + sum(dict(changed.values()).values()),
            batch_size=subject.settings.batch_size,
            masks_documents=subject.settings.masks_documents,
            lags=lags,
        )
    of_step = [graph_memory.peak_bytes(graphs, held, changed, lag=lag) for lag in lags]
    peak, waiting = (max(pair) for pair in zip(of_step, of_validation, strict=True))
    return MemoryForecast(peak, rows.num_rows * (rows.tokens.shape[1] - 1), of_validation[0], waiting)


def _traceable(kernels: ModelKernels) -> AbstractContextManager[None]:
    """Return a context in which the kernels in use can be traced; where there are none, no kernel is imported."""
    if not kernels.selected:
        return nullcontext()
    from mlxflow.kernels import codegen

    return codegen.traceable()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no cycles in a block: graphs have many objects and no cycles, and searching takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _graphs_of(step: Step, subject: build.Subject, rows: Rows) -> tuple[list[Graph], int, dict[str, tuple[str, int]]]:
    """Return the graphs of a step, the bytes that they never free, and the buffers that they replace.

    The trainer sends the gradients to the device before the update that reads them.
    """
    model, update = subject.model, step.of_update
    weights, state = dict(tree_flatten(model.parameters())), dict(tree_flatten(update.state))
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    passed, names = _trace_pass(step, model, weights, rows)
    updated = _trace_update(step, model, passed.outputs, names, state)
    held = sum(value.nbytes for name, value in weights.items() if name not in trained)
    held += rows.tokens.nbytes + rows.marks.nbytes
    if subject.settings.grad_accum_steps > 1:  # the sums of the passes before
        held += sum(4 * weights[name].size for name in trained)
    of_state = dict(zip(state, updated.inputs[len(passed.outputs) :], strict=True))
    changed = {value.name: (value.name, value.nbytes) for value in of_state.values()}
    of_model = dict(zip(weights, passed.inputs[2:], strict=True))
    for name in trained:
        owner = of_state.get(_long_array(step, name)) if weights[name].dtype == _state_dtype(step) else None
        value = of_model[name]
        changed[value.name] = (value.name, value.nbytes) if owner is None else (owner.name, owner.nbytes)
    first, second = compiled(passed), compiled(updated)
    given = [value.name for value in updated.inputs]
    gradients = dict(zip(given, first.results, strict=False))  # the state follows
    linked = [one.with_inputs(gradients) for one in second.operations]
    results = [gradients.get(name, name) for name in second.results]
    return [first, Graph(linked, results, updated.inputs)], held, changed


def _long_array(step: Step, name: str) -> str:
    """Return the path in the update's state of the array that holds a trained weight."""
    layout = step.of_update.layout
    if layout is None:
        return f"weights.{name}"
    holders = (key for key, places in layout.places.items() if any(path == name for path, _ in places))
    return f"weights.{next(holders)}"


def _state_dtype(step: Step) -> mx.Dtype:
    """Return the dtype of the weights in the update's state; the model's are views of them if theirs is the same."""
    dtype: mx.Dtype = tree_flatten(step.of_update.state["weights"])[0][1].dtype
    return dtype


def _trace_pass(step: Step, model: nn.Module, weights: dict[str, mx.array], rows: Rows) -> tuple[Traced, list[str]]:
    """Return the graph of a forward and backward pass, and the names of the gradients.

    Its arguments are tokens, marks and the weights; it returns the loss, the number of targets and the gradients.
    """
    names: list[str] = []

    def compute(tokens: mx.array, marks: mx.array, *arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(weights, arrays, strict=True))))
        total, count, tree = step.gradients(tokens, marks)
        flat = tree_flatten(tree)
        names[:] = [name for name, _ in flat]
        return [total, count, *(value for _, value in flat)]

    arguments = [mx.zeros(rows.tokens.shape, mx.int32), mx.zeros(rows.marks.shape, mx.uint8), *weights.values()]
    traced = trace(compute, arguments, prefix="pass ")
    model.update(tree_unflatten(list(weights.items())))
    return traced, names


def _trace_update(
    step: Step, model: nn.Module, results: Sequence[Value], names: list[str], state: dict[str, mx.array]
) -> Traced:
    """Return the graph of an update: of the results of a pass and the state; it returns the new state and weights."""
    update = step.of_update
    dtypes = {4: mx.float32, 2: mx.bfloat16}

    def compute(total: mx.array, count: mx.array, *arrays: mx.array) -> list[mx.array]:
        _assign(update.state, dict(zip(state, arrays[len(names) :], strict=True)))
        tree = tree_unflatten(list(zip(names, arrays, strict=False)))
        outcome = update(total, count, update.join(tree))
        changed = [*tree_flatten(model.trainable_parameters()), *tree_flatten(update.state)]  # as they are evaluated
        return [*outcome, *(value for _, value in changed)]

    arguments = [mx.zeros(value.shape, dtypes[value.itemsize]) for value in results]
    traced = trace(compute, [*arguments, *state.values()], prefix="update ")
    _assign(update.state, state)
    return traced


def _assign(tree: Any, arrays: dict[str, mx.array], path: str = "") -> None:
    """Set the leaves of a tree by their paths."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        if isinstance(value, mx.array):
            tree[key] = arrays[f"{path}{key}"]
        elif isinstance(value, dict | list):
            _assign(value, arrays, f"{path}{key}.")
