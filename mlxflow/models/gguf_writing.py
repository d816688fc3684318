"""Write the model of a folder as a GGUF file for llama.cpp, read it back, and compare every tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.models import gguf_architectures, gguf_blocks, gguf_tokenizer, model_folder, quantized_layers
from mlxflow.models.adapter_files import fuse
from mlxflow.models.gguf_architectures import GgufArchitecture
from mlxflow.models.gguf_blocks import Encoding
from mlxflow.storage import config_json
from mlxflow.storage.host_arrays import numpy_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The largest relative error of a matrix that a type with so many bits may have; far above what rounding makes
_MOST_ERROR = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "q8_0": 0.02, "q6_k": 0.06, "q5_0": 0.15, "q5_1": 0.15}
_MOST_ERROR_OF_FOUR_BITS = 0.3


class GgufRequest(NamedTuple):
    """How a model is written.

    Attributes:
        type: of the matrices; see `gguf_blocks.choose`.
        outer_type: of embedding and head; "auto" for that of the others, but q8_0 instead of fewer bits.
        name: of the model, for readers of the file.
        licence: of its base; empty if it is not known.
        key: names the model in messages.
    """

    type: str
    outer_type: str
    name: str
    licence: str
    key: str


class WrittenTensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        path: mlx-lm's.
        shape: of the dense tensor.
        type: one of `gguf_blocks.FILE_TYPES`.
        was_quantized: whether the model holds it as codes.
        keeps_codes: whether MLX's codes were written as they are.
        relative_error: Frobenius norm of the difference between the tensor read back and the model's, in fp32, divided
            by that of the model's.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    type: str
    was_quantized: bool
    keeps_codes: bool
    relative_error: float


class WrittenModel(NamedTuple):
    """The file.

    Attributes:
        architecture: llama.cpp's name.
        file_type: that of most weights.
        tensors: in the order of the file.
        fields: of the header that describe the tokenizer.
        context_length: of the model, in tokens.
    """

    architecture: str
    file_type: str
    tensors: tuple[WrittenTensor, ...]
    fields: Mapping[str, Any]
    context_length: int


class _Source(NamedTuple):
    """A tensor to write: a parameter of the model, or the weight of a quantized layer."""

    name: str
    path: str
    layer: nn.Module | None  # of a matrix
    value: mx.array
    encoding: Encoding
    rows: "NDArray[np.intp] | None"
    added: float

    @property
    def shape(self) -> tuple[int, ...]:
        if self.layer is None or "scales" not in self.layer:
            return tuple(self.value.shape)
        return (*self.value.shape[:-1], self.value.shape[-1] * 32 // self.layer.bits)

    def encoded(self) -> "NDArray[Any]":
        if self.layer is not None:
            return gguf_blocks.encode(self.layer, self.encoding, self.rows)
        return gguf_blocks.encode_floats(self.expected(), self.encoding.type)

    def expected(self) -> "NDArray[Any]":
        """Return the dense tensor in fp32, in the file's order of rows."""
        value = self.value if self.layer is None else _dense(self.layer)
        dense = numpy_of(value.astype(mx.float32))
        return (dense if self.rows is None else dense[self.rows]) + np.float32(self.added)


def _dense(layer: nn.Module) -> mx.array:
    """Return the weight of a layer, computed from its scales and biases in fp32, not rounded to 16 bits."""
    if "scales" not in layer or getattr(layer, "mode", "affine") != "affine":
        return quantized_layers.dense_weight(layer)
    scales, biases = (one.astype(mx.float32) for one in (layer.scales, layer.biases))
    return mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)


def write(folder: Path, file: Path, request: GgufRequest) -> WrittenModel:
    """Write the model of a folder, with its adapters fused, as a GGUF file, and compare it with the model.

    Args:
        folder: a model folder with a tokenizer.
        file: the GGUF file.
        request: how.

    Raises:
        ArtifactError: llama.cpp does not know the architecture, one of its settings, or the tokenizer.
        StageError: a tensor of the file is not that of the model.
    """
    config = config_json.read(folder)
    gguf_architectures.of_config(config, request.key)  # before the weights are read
    model, config = model_folder.load(folder, lazy=True)
    fuse(model, dequantize=True)
    config = _completed(config, model)
    architecture = gguf_architectures.of_config(config, request.key)
    fields: dict[str, Any] = dict(gguf_architectures.header(architecture, config, request.key))
    vocab_size = int(fields[f"{architecture.name}.vocab_size"])
    tokenizer = gguf_tokenizer.fields_of(folder, sorted(config_json.end_of_text(config)), vocab_size, request.key)
    sources = list(_sources(model, architecture, config, request))
    file_type = _most_frequent(sources)
    general = {"general.type": "model", "general.name": request.name, "general.quantization_version": 2}
    if request.licence:
        general["general.license"] = request.licence
    general["general.file_type"] = gguf_blocks.FILE_TYPES[file_type]
    _write_file(file, architecture.name, {**general, **fields, **tokenizer}, sources)
    errors = _read_back(file, sources, request.key)
    tensors = tuple(
        WrittenTensor(
            one.name,
            one.path,
            one.shape,
            one.encoding.type,
            one.layer is not None and "scales" in one.layer,
            one.encoding.keeps_codes,
            errors[one.name],
        )
        for one in sources
    )
    return WrittenModel(architecture.name, file_type, tensors, tokenizer, config_json.num_positions(config))


def _completed(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a config with the values that mlx-lm's class filled in."""
    args = {name: value for name, value in vars(model.args).items() if value is not None}
    return {**config, **args}


def _most_frequent(sources: list[_Source]) -> str:
    """Return the type of most weights."""
    counts: dict[str, int] = {}
    for one in sources:
        counts[one.encoding.type] = counts.get(one.encoding.type, 0) + int(np.prod(one.shape))
    return max(counts, key=lambda kind: counts[kind])


def _sources(
    model: nn.Module, architecture: GgufArchitecture, config: Mapping[str, Any], request: GgufRequest
) -> Iterator[_Source]:
    """Yield every tensor to write.

    Raises:
        ArtifactError: llama.cpp has no name for a parameter.
    """
    layers = dict(model.named_modules())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads")}
    if factors := gguf_architectures.rope_factors(config):
        yield _Source("rope_freqs.weight", "", None, mx.array(factors), Encoding("f32", keeps_codes=False), None, 0)
    for path, value in tree_flatten(model.parameters()):
        module, _, own = path.rpartition(".")
        layer = layers.get(module)
        if layer is not None and "scales" in layer and own in ("scales", "biases"):
            continue
        name = architecture.tensor_name(path)
        if not name:
            raise ArtifactError(
                f"{request.key}: its weight {path} has no name in llama.cpp's {architecture.name}. "
                'Export it with format = "mlx".'
            )
        kind = name.split(".")[-2]
        matrix = layer if own == "weight" and value.ndim > 1 else None
        permutes = architecture.permutes and kind in heads
        rows = gguf_architectures.rotary_order(value.shape[0], heads[kind] or heads["attn_q"]) if permutes else None
        added = 1.0 if architecture.adds_one and kind.endswith("norm") else 0.0
        yield _Source(name, path, matrix, value, _encoding(kind, matrix, request), rows, added)


def _encoding(kind: str, matrix: nn.Module | None, request: GgufRequest) -> Encoding:
    """Return how a tensor is written: vectors, and the router that chooses experts, in fp32."""
    if matrix is None or kind == "ffn_gate_inp":
        return Encoding("f32", keeps_codes=False)
    is_outer = kind in ("token_embd", "output")
    return gguf_blocks.choose(matrix, request.type, is_outer=is_outer, outer=request.outer_type)


def _write_file(file: Path, architecture: str, fields: Mapping[str, Any], sources: list[_Source]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, architecture)
    for name, value in fields.items():
        _add(writer, name, value)
    for one in sources:
        kind = GGMLQuantizationType[one.encoding.type.upper()]
        shape, dtype, size = _stored_form(one, kind)
        writer.add_tensor_info(one.name, shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in sources:
        writer.write_tensor_data(one.encoded())
    writer.close()


def _stored_form(source: _Source, kind: Any) -> tuple[tuple[int, ...], "np.dtype[Any]", int]:
    """Return shape, dtype and bytes of a tensor as `encoded` returns it."""
    from gguf.constants import GGML_QUANT_SIZES

    if source.encoding.type in ("f32", "f16"):
        dtype: np.dtype[Any] = np.dtype(source.encoding.type.replace("f", "float"))
        return source.shape, dtype, int(np.prod(source.shape)) * dtype.itemsize
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (*source.shape[:-1], source.shape[-1] // per_block * block_bytes)
    return shape, np.dtype(np.uint8), int(np.prod(shape))


def _add(writer: Any, name: str, value: Any) -> None:
    """Add a field to the header; numbers get the types that llama.cpp reads."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif name == "tokenizer.ggml.token_type":
        writer.add_token_types(value)
    else:
        writer.add_array(name, value)


def _read_back(file: Path, sources: list[_Source], key: str) -> dict[str, float]:
    """Return the relative error of every tensor of a file, by its name.

    Raises:
        StageError: a tensor is missing or differs by more than its type rounds.
    """
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    errors: dict[str, float] = {}
    for one in sources:
        tensor = tensors.get(one.name)
        found = None if tensor is None else np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        expected = one.expected()
        if found is None or found.shape != expected.shape:
            raise StageError(f"{key}: {one.name} was not written. Report this as a bug.")
        norm, difference = (float(np.linalg.norm(one.ravel())) for one in (expected, expected - found))
        error = difference / norm if norm else difference
        most = 2e-3 if one.encoding.keeps_codes else _MOST_ERROR.get(one.encoding.type, _MOST_ERROR_OF_FOUR_BITS)
        if not error <= most:  # also where it is not a number
            raise StageError(
                f"{key}: {one.name} read back as {one.encoding.type} differs by {error:.2g} from {one.path}, more than "
                f"that type rounds ({most:.2g}). Choose another type."
            )
        errors[one.name] = error
    return errors
