"""Export a quantized model layer by layer: memory holds one layer at a time, not the model."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.messages.errors import ArtifactError
from mlxflow.quantization.codec import Packed, pack, scales_dtype, unpack
from mlxflow.quantization.settings import Setting
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.tensor_reading import StoredRows
from mlxflow.storage.tensor_writing import TensorFile

# Numbers packed and compared at a time; intermediate results are several times as large
_NUMBERS_AT_ONCE = 1 << 19

# Numbers of a matrix, in evenly spread rows, on which the error is measured: unpacking costs as much as packing
_COMPARED_NUMBERS = 1 << 17

# Streams on the CPU: each uses one core
_MOST_STREAMS = 4

# The limit of MLX's cache of freed buffers in bytes; more would not be reused
_CACHE_BYTES = 16 << 20


class LayerFacts(NamedTuple):
    """The exported form of one layer's matrix.

    Attributes:
        path: of the layer.
        shape: of the dense matrix.
        setting: of its quantization; None if it stays dense.
        num_bytes: stored size, scales and biases included.
        relative_error: Frobenius norm of the error over that of the matrix, on every k-th row of a piece, for about
            131,000 numbers; 0 if it stays dense.
    """

    path: str
    shape: tuple[int, ...]
    setting: Setting | None
    num_bytes: int
    relative_error: float

    @property
    def parameters(self) -> int:
        """Number of weights in the matrix."""
        return _count(self.shape)


class Exported(NamedTuple):
    """A written model.

    Attributes:
        layers: every matrix, in the model's order.
        parameters: of the whole model, tied ones once.
        num_bytes: of all tensors.
        dense_bytes: of all tensors of the dense model.
    """

    layers: list[LayerFacts]
    parameters: int
    num_bytes: int
    dense_bytes: int


def export(
    model: nn.Module,
    layers: Mapping[str, Setting],
    *,
    file: Path,
    metadata: Mapping[str, str],
    packed: Callable[[str], Packed | None],
    stored: Mapping[str, StoredRows],
    source: str,
    watch: Callable[[str], None],
) -> Exported:
    """Write a model's parameters with some layers quantized; each is computed, written and freed before the next.

    Args:
        model: dense; lazy weights are read one by one. Its parameters are removed.
        layers: module path to setting.
        file: the safetensors file to write.
        metadata: text by key, for the header.
        packed: returns the codes of a layer by path; None if the layer is to be rounded.
        stored: matrices that are in a file unchanged, by name; they are read row by row.
        source: the origin of the model, for messages.
        watch: called with the path of each quantized layer.

    Raises:
        ArtifactError: a weight is not finite; names the tensor.
        StageError: the disk has too little space for the file.
    """
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    owned = {path for path, _ in leaves}
    loose = {name: value for name, value in tree_flatten(model.parameters()) if name.rpartition(".")[0] not in owned}
    entries = dict(_entries(model, layers))
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    dense_bytes = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    facts: list[LayerFacts] = []
    streams = _streams()
    with TensorFile(file, entries, metadata) as out, _small_cache():
        for name in list(loose):
            _put(out, name, loose.pop(name), source)
        for path, layer in leaves:
            setting = layers.get(path)
            codes = None if setting is None else packed(path)
            facts += _write_layer(out, path, layer, setting, codes, stored, source, streams)
            for name in [name for name, value in layer.items() if isinstance(value, mx.array)]:
                layer.pop(name)
            if setting is not None:
                watch(path)
    num_bytes = sum(dtype.size * _count(shape) for dtype, shape in entries.values())
    return Exported(facts, parameters, num_bytes, dense_bytes)


def _write_layer(
    out: TensorFile,
    path: str,
    layer: nn.Module,
    setting: Setting | None,
    codes: Packed | None,
    stored: Mapping[str, StoredRows],
    source: str,
    streams: list[mx.Stream],
) -> Iterator[LayerFacts]:
    """Write a layer's tensors, its weight quantized if it has a setting; yield the facts about each matrix."""
    for own, value in tree_flatten(layer.parameters()):
        name = f"{path}.{own}" if path else own
        if own == "weight" and setting is not None:
            yield _write_packed(out, path, _Matrix(name, value, stored.get(name)), setting, codes, source, streams)
            continue
        _put(out, name, value, source)
        if own == "weight" and value.ndim > 1:
            yield LayerFacts(path, value.shape, None, value.nbytes, 0.0)


def _streams() -> list[mx.Stream]:
    """Return the streams on which pieces of a matrix are packed in parallel."""
    device = mx.default_device()
    if device != mx.cpu:
        return [mx.default_stream(device)]
    return [mx.new_stream(device) for _ in range(min(_MOST_STREAMS, os.cpu_count() or 1))]


@contextmanager
def _small_cache() -> Iterator[None]:
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _entries(model: nn.Module, layers: Mapping[str, Setting]) -> Iterator[tuple[str, tuple[mx.Dtype, tuple[int, ...]]]]:
    """Yield name, dtype and shape of every tensor of the quantized model."""
    for name, value in tree_flatten(model.parameters()):
        path, _, own = name.rpartition(".")
        setting = layers.get(path) if own == "weight" else None
        if setting is None:
            yield name, (value.dtype, value.shape)
            continue
        *rows, width = value.shape
        groups = (*rows, width // setting.group_size)
        yield name, (mx.uint32, (*rows, width * setting.bits // 32))
        has_biases = setting.stored_mode == "affine"
        dtype = scales_dtype(setting, value.dtype) if has_biases else mx.uint8
        yield f"{path}.scales", (dtype, groups)
        if has_biases:
            yield f"{path}.biases", (dtype, groups)


class _Matrix:
    """The weight of a layer, read a few rows at a time."""

    def __init__(self, name: str, weight: mx.array, stored: StoredRows | None) -> None:
        self.name, self.weight, self._stored = name, weight, stored
        if stored is None:
            mx.eval(weight)
        self.num_rows = _count(weight.shape[:-1])

    def rows(self, begin: int, end: int) -> mx.array:
        if self._stored is None:
            return self.weight.reshape(-1, self.weight.shape[-1])[begin:end]
        return self._stored.read(begin, end).astype(self.weight.dtype)


def _write_packed(
    out: TensorFile,
    path: str,
    matrix: _Matrix,
    setting: Setting,
    codes: Packed | None,
    source: str,
    streams: list[mx.Stream],
) -> LayerFacts:
    size = matrix.weight.size
    pieces = -(-size // (_NUMBERS_AT_ONCE * len(streams))) * len(streams)
    step = -(-matrix.num_rows // pieces)
    every = max(1, size // _COMPARED_NUMBERS)
    begun: deque[tuple[Packed, mx.array, mx.array, mx.array]] = deque()
    num_bytes, lost, norm, whole = 0, 0.0, 0.0, 0.0

    def end_one() -> None:
        nonlocal num_bytes, lost, norm, whole
        packed, exact, compared, missed = begun.popleft()
        for own, part in zip(("weight", "scales", "biases"), packed, strict=True):
            if part is not None:
                out.put_rows(f"{path}.{own}", part)
                num_bytes += part.nbytes
        lost, norm, whole = lost + _square(missed), norm + _square(compared), whole + _square(exact)

    for place, begin in enumerate(range(0, matrix.num_rows, step)):
        with mx.stream(streams[place % len(streams)]):
            part = matrix.rows(begin, min(begin + step, matrix.num_rows))
            packed = pack(part, setting) if codes is None else _rows_of(codes, begin, begin + step)
            exact = part.astype(mx.float32)
            compared = exact[::every]
            some = Packed(*(None if column is None else column[::every] for column in packed))  # type: ignore[arg-type]
            missed = compared - unpack(some, setting, part.dtype).astype(mx.float32)
            mx.async_eval(packed, exact, compared, missed)
        begun.append((packed, exact, compared, missed))
        if len(begun) > len(streams):
            end_one()
    while begun:
        end_one()
    if not math.isfinite(whole):
        raise _not_finite(source, matrix.name, matrix.weight)
    error = math.sqrt(lost / norm) if norm else 0.0
    return LayerFacts(path, matrix.weight.shape, setting, num_bytes, error)


def _rows_of(codes: Packed, begin: int, end: int) -> Packed:
    flat = [None if part is None else part.reshape(-1, part.shape[-1])[begin:end] for part in codes]
    return Packed(*flat)  # type: ignore[arg-type]


def _square(x: mx.array) -> float:
    """Return the sum of squares of an fp32 array; NumPy's dot product takes one pass, MLX two."""
    numbers = numpy_of(x, copy=False).reshape(-1)
    return float(np.dot(numbers, numbers))


def _put(out: TensorFile, name: str, value: mx.array, source: str) -> None:
    if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
        raise _not_finite(source, name, value)
    out.put(name, value)


def _not_finite(source: str, name: str, value: mx.array) -> ArtifactError:
    count = round(float((~mx.isfinite(value)).sum()))
    return ArtifactError(
        f"{source}: {name}: {count:,} of {value.size:,} values are not finite. Train or fetch the model again."
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
