"""Captures the Metal source that MLX generates for a custom kernel, on a machine without Metal.

While a function is exported, MLX builds a kernel's source and prints it if it is called with `verbose`; no device is
needed. The text is taken as it is printed.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

_PRINTED = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*?)```\n", re.DOTALL)
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_PARAMETER = re.compile(r"^\s*(.*?[*& ])(\w+) \[\[(\w+)(?:\(\d+\))?\]\]$")
_INSTANCE = re.compile(r"^template \[\[host_name.*?decltype\((\w+<[^>]*>)\)", re.MULTILINE)


class Parameter(NamedTuple):
    """A parameter of a kernel.

    Attributes:
        type: as written, such as "const device float*".
        name: of the parameter.
        attribute: "buffer", or what the parameter says of a thread's position.
    """

    type: str
    name: str
    attribute: str


class MetalSource(NamedTuple):
    """What MLX hands to Metal's compiler for one kernel.

    Attributes:
        text: all of it.
    """

    text: str

    @property
    def definitions(self) -> str:
        """The text up to the explicit instantiation, whose attributes only Metal's compiler accepts."""
        return self.text[: self._instance.start()]

    @property
    def instance(self) -> str:
        """The kernel with its template arguments, such as "name<256, float>"."""
        return self._instance[1]

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters of the kernel."""
        signature = _SIGNATURE.search(self.text)
        assert signature, self.text
        lines = [line.rstrip(",") for line in signature[2].splitlines()]
        return [Parameter(found[1].strip(), found[2], found[3]) for found in map(_PARAMETER.match, lines) if found]

    @property
    def _instance(self) -> re.Match[str]:
        found = _INSTANCE.search(self.text)
        assert found, f"no instantiation in {self.text}"
        return found


def capture(
    kernel: Callable[..., list[mx.array]], inputs: Sequence[mx.array], arguments: dict[str, Any]
) -> MetalSource:
    """Return the source that MLX generates for a call of a kernel.

    Args:
        kernel: of `mx.fast.metal_kernel`.
        inputs: arrays; only their shapes and dtypes matter.
        arguments: the others of the call.
    """

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), **arguments, verbose=True)

    with tempfile.TemporaryDirectory() as folder:
        zeros = [mx.zeros(array.shape, array.dtype) for array in inputs]
        printed = _standard_output(lambda: mx.export_function(f"{folder}/kernel.mlxfn", call, *zeros), Path(folder))
    found = _PRINTED.findall(printed)
    assert len(found) == 1, f"MLX printed {printed!r}"
    return MetalSource(found[0])


def _standard_output(function: Callable[[], object], folder: Path) -> str:
    """Return what a function writes to descriptor 1, from C++ too."""
    path, before = folder / "printed", os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
            function()
    finally:
        os.dup2(before, 1)
        os.close(before)
    return path.read_text(encoding="utf-8")
