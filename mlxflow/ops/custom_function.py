"""`mx.custom_function` whose calls can be followed: functions with a gradient of their own.

MLX keeps such a call in its graph as an operation that it cannot export. While a `CallRecorder` is installed, calls go
to it instead, so that the graph of a training step can be traced without one (`ops/graph_trace.py`).
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import mlx.core as mx

_F = TypeVar("_F", bound=Callable[..., Any])


class CustomFunction:
    """A function of arrays with a gradient of its own.

    Args:
        forward: of arrays; returns one array or several.

    Attributes:
        forward: see above.
        gradients: of the arguments (the argument itself if it is one), the incoming gradients and the results; returns
            the gradients of the arguments. None until `vjp` sets it.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.gradients: Callable[..., Any] | None = None
        self._function = mx.custom_function(forward)

    def vjp(self, gradients: _F) -> _F:
        """Set the function that computes the gradients; a decorator."""
        self.gradients = gradients
        self._function.vjp(gradients)
        return gradients

    def __call__(self, *arguments: Any) -> Any:
        """Return the function's results."""
        recorder = _recorder.get()
        return self._function(*arguments) if recorder is None else recorder.call(self, arguments)


class CallRecorder(Protocol):
    """Takes the calls of custom functions while it is installed."""

    def call(self, function: CustomFunction, arguments: tuple[Any, ...]) -> Any:
        """Return the results of a call."""
        ...

    def disregard(self, result: mx.array) -> None:
        """Note that nothing needs the result of a call."""
        ...


_recorder: ContextVar[CallRecorder | None] = ContextVar("recorder", default=None)


def custom_function(forward: Callable[..., Any]) -> CustomFunction:
    """Return a function of arrays to which `vjp` gives a gradient of its own; a decorator."""
    return CustomFunction(forward)


def disregard(result: mx.array) -> None:
    """Report to a recorder that nothing needs the result of a call, which MLX then neither computes nor derives.

    Args:
        result: that a custom function returned.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.disregard(result)


@contextmanager
def recorded(recorder: CallRecorder) -> Any:
    """Send the calls of all custom functions to a recorder until the block ends."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
