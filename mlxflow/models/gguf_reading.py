"""Read a GGUF file as a model folder in mlx-lm's format: weights, configuration, and a rebuilt tokenizer.

Tensors of floats keep their dtype. Quantized ones are dequantized through `gguf`, to fp16: their scales have no more
precision, and the rounding is a hundredth of that of the codes. Of Gemma, whose activations exceed fp16, to bf16.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import ArtifactError, reason_of
from mlxflow.messages.os_errors import advise_on
from mlxflow.models import gguf_architectures, gguf_vocabulary
from mlxflow.models.gguf_architectures import GgufArchitecture
from mlxflow.storage import atomic_folders, config_json, gguf_header, model_files, user_folders
from mlxflow.storage.digests import digest_file

if TYPE_CHECKING:
    import mlx.core as mx
    from numpy.typing import NDArray


# Part of the name of the folders: raised when earlier ones are no longer right
_FORM = 2

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FACTORS = "rope_freqs.weight"


def write_folder(file: Path, folder: Path, *, key: str) -> None:
    """Write the model folder of a GGUF file; `config.json` is written last.

    Args:
        file: the GGUF file.
        folder: is there already, and empty.
        key: names the file in messages.

    Raises:
        ArtifactError: `gguf` is not installed, the file is damaged, its architecture or tokenizer is not known, a
            tensor has no place in the model, or the vocabulary does not round-trip.
    """
    reader = _open(file, key)
    field = _fields(reader)
    architecture = gguf_architectures.of_name(str(field("general.architecture")), key)
    definition = gguf_vocabulary.definition_of(field, key)
    gguf_vocabulary.require_round_trip(definition, key)
    config = _config(architecture, field, reader, key)
    _write_weights(reader, architecture, config, folder / model_files.WEIGHTS, key)
    settings = gguf_vocabulary.settings_of(field, config["max_position_embeddings"])
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    (folder / model_files.TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    config_json.write(folder / model_files.CONFIG, config)


def folder_of(files: Sequence[Path], *, key: str) -> Path:
    """Return the folder of a model's files; of a GGUF file, the one that it is converted to.

    The folder of a GGUF file is in the user's cache, named by the content of the file, and is written once.

    Args:
        files: of a model folder, or one GGUF file.
        key: names the model in messages.

    Raises:
        ArtifactError: see `write_folder`.
    """
    if not gguf_header.is_named(files[0].name):
        return files[0].parent
    folder = user_folders.cache_folder() / "gguf" / f"{digest_file(files[0]).identity[:24]}-{_FORM}"
    if not (folder / model_files.CONFIG).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folders.publishing(folder) as private:
            write_folder(files[0], private, key=key)
        size = show_bytes(sum(file.stat().st_size for file in folder.iterdir()))
        terminal.say(f"{key}: converted to {folder}, {size}; it is used again as long as the file is the same")
    return folder


def opened(model: Path) -> Path:
    """Return a model folder; of a GGUF file, the one that it is converted to.

    Raises:
        ArtifactError: see `write_folder`.
    """
    if gguf_header.is_named(model.name) and model.is_file():
        return folder_of([model], key=str(model))
    return model


def tokenizer_files(files: Sequence[Path], *, key: str) -> tuple[Path, ...]:
    """Return the files of a tokenizer; those of a GGUF file are in the folder that it is converted to.

    Raises:
        ArtifactError: see `write_folder`.
    """
    if not files or not gguf_header.is_named(files[0].name):
        return tuple(files)
    folder = folder_of(files, key=key)
    return tuple(folder / name for name in model_files.tokenizer_files(folder))


def _open(file: Path, key: str) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ArtifactError(f"{key}: needs gguf. Run: pip install 'mlxflow[gguf]'") from error
    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        advice = advise_on(error, "Download it again")
        raise ArtifactError(f"{key}: cannot be read as GGUF ({reason_of(error)}). {advice}.") from error


def _fields(reader: Any) -> Callable[[str], Any]:
    """Return a function that returns a field of the header by its name, decoded once."""
    known: dict[str, Any] = {}

    def field(name: str) -> Any:
        if name not in known:
            found = reader.fields.get(name)
            value = None if found is None else found.contents()
            known[name] = float(str(np.float32(value))) if isinstance(value, float) else value
        return known[name]

    return field


def _config(architecture: GgufArchitecture, field: Callable[[str], Any], reader: Any, key: str) -> dict[str, Any]:
    try:
        config = gguf_architectures.config_json(architecture, field)
    except KeyError as error:
        raise ArtifactError(f"{key}: its header has no {error.args[0]}. Download it again.") from error
    _require_known_rope(architecture.name, field, config["head_dim"], key)
    names = {tensor.name for tensor in reader.tensors}
    config |= _rope_scaling(config, reader, key)
    config["tie_word_embeddings"] = "output.weight" not in names
    biased = {"attn_q.bias": "attention_bias", "ffn_gate.bias": "mlp_bias"}
    if architecture.name == "llama":
        config |= {own: f"blk.0.{name}" in names for name, own in biased.items()}
    embedding = next((one for one in reader.tensors if one.name == "token_embd.weight"), None)
    if embedding is not None:
        config["vocab_size"] = int(embedding.shape[-1])
    ends = gguf_vocabulary.ends_of(field)
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    config["bos_token_id"] = field("tokenizer.ggml.bos_token_id")
    return {name: value for name, value in config.items() if value is not None}


def _require_known_rope(name: str, field: Callable[[str], Any], head_dim: int, key: str) -> None:
    """Check that the rotary embedding is one that `config_json` describes.

    Raises:
        ArtifactError: it has another scaling, or turns a part of each head.
    """
    kind, factor = field(f"{name}.rope.scaling.type"), field(f"{name}.rope.scaling.factor")
    if kind not in (None, "none", "linear"):
        problem = f'a rotary embedding scaled by "{kind}"'
    elif kind == "none" and factor is not None:
        problem = f'a rotary embedding scaled by "none" with the factor {factor:g}'
    elif (turned := field(f"{name}.rope.dimension_count")) not in (None, head_dim):
        problem = f"a rotary embedding of {turned} of {head_dim} numbers of a head"
    else:
        return
    raise ArtifactError(f"{key}: its header has {problem}, which cannot be read. Use the original model folder.")


def _rope_scaling(config: dict[str, Any], reader: Any, key: str) -> dict[str, Any]:
    """Return the scaling of the rotary embedding that a table of factors is made of; empty without a table.

    Raises:
        ArtifactError: it is not that of Llama 3.1 and newer, which differ by one factor.
    """
    tables = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if not tables:
        return {}
    factors = np.asarray(tables[0].data, np.float32)
    scaling = {**_LLAMA3, "factor": float(factors.max())}
    expected = np.asarray(gguf_architectures.rope_factors({**config, "rope_scaling": scaling}), np.float32)
    if tables[0].name != _FACTORS or len(expected) != len(factors) or not np.allclose(expected, factors, rtol=1e-4):
        raise ArtifactError(
            f"{key}: its rotary embedding has a table of factors that is not Llama 3's. Use the original model folder."
        )
    return {"rope_scaling": scaling}


def _write_weights(reader: Any, architecture: GgufArchitecture, config: dict[str, Any], file: Path, key: str) -> None:
    """Write the tensors one by one, and set the dtype of the config.

    Raises:
        ArtifactError: a tensor has no place in the model, or is of a type that cannot be dequantized.
    """
    import mlx.core as mx

    from mlxflow.storage.tensor_writing import TensorFile

    dtypes = {"F32": mx.float32, "BF16": mx.bfloat16}
    entries: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
    matrices: set[str] = set()
    tensors = [tensor for tensor in reader.tensors if tensor.name != _FACTORS]
    for tensor in tensors:
        if not (path := architecture.path(tensor.name)):
            raise ArtifactError(f"{key}: its tensor {tensor.name} has no place in {architecture.name}. Name another.")
        shape = tuple(int(one) for one in reversed(tensor.shape))
        entries[path] = (dtypes.get(tensor.tensor_type.name, mx.float16), shape)
        if len(shape) > 1:
            matrices.add(path)
    dtype = _dtype_of([entries[path][0] for path in matrices], architecture)
    entries = {path: (dtype, shape) for path, (_, shape) in entries.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with TensorFile(file, entries, {"format": "mlx"}) as written:
        for tensor in tensors:
            dense = _dense(tensor, key)
            kind = tensor.name.split(".")[-2]
            if architecture.permutes and kind in heads:
                dense = unpermuted(dense, heads[kind])
            if architecture.adds_one and kind.endswith("norm"):
                dense = dense - np.float32(1)
            written.put(architecture.path(tensor.name), mx.array(dense).astype(dtype))
    config["torch_dtype"] = str(dtype).rpartition(".")[2]


def _dtype_of(kinds: "list[mx.Dtype]", architecture: GgufArchitecture) -> "mx.Dtype":
    """Return the dtype of a folder: that of most matrices, in which the architecture can compute."""
    import mlx.core as mx

    most = max(set(kinds), key=kinds.count) if kinds else mx.float16
    return mx.bfloat16 if most == mx.float16 and architecture.exceeds_fp16 else most


def _dense(tensor: Any, key: str) -> "NDArray[Any]":
    from gguf import dequantize

    try:
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise ArtifactError(
            f"{key}: {tensor.name} is of the type {tensor.tensor_type.name}, which gguf cannot dequantize. "
            "Name another file."
        ) from error


def unpermuted(rows: "NDArray[Any]", num_heads: int) -> "NDArray[Any]":
    """Return the rows of q or k, (H * D, ...), in the order of Hugging Face's rotary embedding.

    Args:
        rows: in llama.cpp's order, the two halves of each head taking turns.
        num_heads: H.
    """
    rest: tuple[int, ...] = rows.shape[1:]
    return rows.reshape(num_heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
