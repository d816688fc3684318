"""A stand-in for how Metal runs out of memory: the error is raised by a later call than the one that caused it."""

from typing import Any

import mlx.core as mx
import pytest

#: What MLX raises on a Mac when a command buffer does not fit.
MESSAGE = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)


class LateDevice:
    """MLX's calls that send work or wait, one of them raising an error of earlier work.

    Attributes:
        calls_left: calls until one raises the error; 0 if no work failed.
        raised_by: the calls that raised an error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls_left = 0
        self.raised_by: list[str] = []
        for name in ("eval", "async_eval", "synchronize"):
            monkeypatch.setattr(mx, name, self._raising(name, getattr(mx, name)))

    def _raising(self, name: str, call: Any) -> Any:
        def called(*arguments: Any) -> Any:
            result = call(*arguments)
            self.calls_left = max(0, failing := self.calls_left - 1)
            if failing == 0:
                self.raised_by.append(name)
                raise RuntimeError(MESSAGE)
            return result

        return called
