"""Model folders: build, load, cast and save their models; all use of mlx-lm's model classes is here.

A model folder holds `config.json` (Hugging Face's keys), `model.safetensors` and the tokenizer files; mlx-lm,
transformers (dense ones) and LM Studio open it unchanged.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlxflow.messages.byte_sizes import show_apart
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import adapter_files, config_fields, model_code, quantized_layers, weight_checks
from mlxflow.ops import gather_matmul, mlx_lm_import, quantized_matmul
from mlxflow.storage import config_json, hub, model_files, remote_code, tensor_reading, tensor_writing


def build(config: Mapping[str, Any], *, seed: int, code: Path | None = None) -> nn.Module:
    """Return a freshly initialized model; see `skeleton`.

    Args:
        config: a `config.json`.
        seed: of the initial weights; the global random state is set by it.
        code: see `skeleton`.
    """
    mx.random.seed(seed)
    model = skeleton(config, code=code)
    mx.eval(model.parameters())
    return model


def require_room(config: Mapping[str, Any], memory_limit_bytes: int, key: str, *, limit_key: str) -> None:
    """Check that the weights of a new model fit into the memory; otherwise MLX would end the process.

    Args:
        config: a `config.json`.
        memory_limit_bytes: MLX's memory limit.
        key: the setting that describes the model, for the message.
        limit_key: the setting of the memory limit, for the message.

    Raises:
        ArtifactError: they do not fit.
    """
    needed = num_bytes(skeleton(config))
    if needed > memory_limit_bytes:
        taken, limit = show_apart(needed, memory_limit_bytes)
        raise ArtifactError(
            f"{key}: its weights take {taken}, memory limit {limit}. Make the model smaller, or raise {limit_key}."
        )


def skeleton(config: Mapping[str, Any], *, code: Path | None = None) -> nn.Module:
    """Return a model with unevaluated initial weights, for its shapes.

    Args:
        config: a `config.json`.
        code: the model folder with the Python file that the config names; None if it names none.

    Raises:
        ArtifactError: mlx-lm does not support the architecture, its code is not trusted or fails, or the config lacks
            a required key.
    """
    gather_matmul.install()
    quantized_matmul.install()
    file = str(code / model_files.CONFIG) if code else model_files.CONFIG
    own = copy.deepcopy(dict(config))  # some architectures complete the tables within it
    try:
        model_class, args_class = model_code.classes(own, code)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ArtifactError(f"config.json: no architecture that mlx-lm knows ({error}). Name another model.") from error
    classes = config_fields.Guarded(model_class, args_class, file)
    model: nn.Module = classes(classes.from_dict(own))
    return model


def load(folder: Path, *, lazy: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a folder, in eval mode, and its `config.json`.

    Adapters in the folder are applied; no code of mlxflow opens such a folder without them.

    Args:
        folder: a model folder.
        lazy: whether weights are read from the disk only when needed.

    Raises:
        ArtifactError: the folder is no model folder, needs untrusted code, or its weights or adapters do not fit its
            config.
    """
    files = _checked_files(folder)
    file = str(folder / model_files.CONFIG)
    floating: dict[str, type[nn.Module]] = {}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = model_code.classes({**config, "model_file": files.code}, folder)
        guarded = config_fields.Guarded(model_class, args_class, file)
        return lambda settings: made(guarded(settings)), guarded

    def made(model: nn.Module) -> nn.Module:
        floating.update(weight_checks.floating_layers(model))
        return model

    gather_matmul.install()
    quantized_matmul.install()
    with model_files.opened(folder, [name for name in files.read if not name.endswith(".py")]) as links:
        try:
            model, config = mlx_lm_import.mlx_lm_utils().load_model(
                links,
                lazy=lazy,
                model_config={"model_file": None},  # `classes` runs this code
                get_model_classes=classes,
            )
        except (OSError, *config_fields.BUILD_ERRORS) as error:
            raise ArtifactError(_unopened_message(folder, str(error).replace(str(links), str(folder)))) from error
    weight_checks.require_readable_codes(folder, model)
    weight_checks.require_numbers(folder, model, floating)
    config = remote_code.copied(config | {"model_file": files.code})
    if not files.code:
        config.pop("model_file", None)
    if adapter_files.are_in(folder):
        model = adapter_files.apply(model, folder)
        if not lazy:
            mx.eval(model.parameters())
    names = [name for name, _ in tree_flatten(model.parameters())]
    return model, config_json.describing(config, weights=names, is_quantized=quantized_layers.is_quantized(model))


def _checked_files(folder: Path) -> model_files.ModelFolderFiles:
    """Return the files of a model folder after the checks that need no model.

    Raises:
        ArtifactError: a file is missing or damaged, or is code that is not trusted.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: missing. Name a model folder such as artifacts/train.")
    files = model_files.find(folder)
    if files.problem:
        raise ArtifactError(f"{folder}: {files.problem}. {files.advice}")
    if files.code and not remote_code.trusts_code():
        raise ArtifactError(f"{folder}: {model_code.untrusted_code_message(model_files.CONFIG, files.code)}")
    weight_checks.require_sound(folder, files.weights)
    config_json.read(folder)
    generation = remote_code.read_table(folder / model_files.GENERATION)
    config_json.require_types(generation, str(folder / model_files.GENERATION))
    return files


def _unopened_message(folder: Path, error: str) -> str:
    """Return why a folder cannot be opened, with the packing format if mlx-lm does not support it."""
    reason = " ".join(error.split())
    config = config_json.read(folder)
    packed = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    if method is None or "quantization" in config:
        return f"{folder}: cannot be opened as a model ({reason}). Build it again."
    return (
        f'{folder}/config.json: quantization_config.quant_method = "{method}": mlx-lm does not read weights of '
        f"{config.get('model_type')} that are packed so ({reason[:200]}). Convert the model to bf16 first."
    )


def stored_matrices(folder: Path, model: nn.Module) -> dict[str, tensor_reading.StoredRows]:
    """Return the matrices of a folder that its model uses unchanged, by the model's names.

    Matrices that mlx-lm's class transforms while loading, and those with an adapter, are left out.

    Args:
        folder: a model folder.
        model: what `load` returned for it; dense.
    """
    adapted = {f"{path}.weight" for path in adapter_files.layers_of(model)}
    stored: dict[str, tensor_reading.StoredRows] = {}
    weights: dict[str, mx.array] = {}
    files = [name for name in model_files.find(folder).weights if name.endswith(".safetensors")]
    with model_files.opened(folder, files) as links:
        for file in files:
            tensors: Any = mx.load(str(links / file))  # lazy: only the header is read
            weights |= tensors
            stored |= tensor_reading.stored_rows(folder / file)
    taken = weights
    if hasattr(model, "sanitize"):  # of a fresh model: some classes remove layers, which fails the second time
        code = folder if model_files.find(folder).code else None
        taken = skeleton(config_json.read(folder), code=code).sanitize(dict(weights))
    return {
        name: rows
        for name, rows in stored.items()
        if name in taken and taken[name] is weights[name] and name not in adapted
    }


def load_for_steps(folder: Path, key: str, *, trains_adapters: bool) -> nn.Module:
    """Return the model of a folder for training steps.

    Args:
        folder: a model folder.
        key: the setting that names it, for the message.
        trains_adapters: whether the steps train adapters, beside weights that may be quantized; else all weights.

    Raises:
        ArtifactError: the folder is no model folder, or its model is quantized and all weights are trained.
    """
    model, _ = load(folder)
    if quantized_layers.is_quantized(model) and not trains_adapters:
        raise _dense_needed(f"{key}: {folder}")
    return model


def refuse_quantized(folder: Path, subject: str) -> None:
    """Refuse a model folder with quantized weights, by its configuration.

    Args:
        folder: with a config.json.
        subject: setting and folder, for the message.

    Raises:
        ArtifactError: they are quantized, or the configuration cannot be read.
    """
    if "quantization" in config_json.read(folder):
        raise _dense_needed(subject)


def _dense_needed(subject: str) -> ArtifactError:
    return ArtifactError(f"{subject} is quantized, and training steps need a dense model. Name a train stage.")


def vocab_size(folder: Path) -> int:
    """Return the vocabulary size, V, of the model of a folder by its config; 2**62 if it has none.

    Raises:
        ArtifactError: the folder has no config.json.
    """
    return config_json.vocab_size(config_json.read(folder))


def save(
    *,
    model: nn.Module,
    config: Mapping[str, Any],
    config_file: Path,
    model_file: Path,
    provenance: Mapping[str, str],
) -> None:
    """Write `config.json` and `model.safetensors`; equal weights give equal bytes."""
    config_json.write(config_file, config)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    tensor_writing.write_tensors(
        model_file, weights, {"format": "mlx"} | tensor_writing.provenance_metadata(provenance)
    )


def cast(model: nn.Module, config: Mapping[str, Any], dtype: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model whose floating weights have a dtype, and a config with that dtype; weights may stay lazy.

    Args:
        model: changed in place.
        config: its `config.json`.
        dtype: "fp32", "fp16", "bf16", or another word for the config's, by the rule of mlx-lm's converter.
    """
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    target = names.get(dtype) or config_json.dtype(config)
    if target is None or target not in names.values():
        return model, dict(config)
    dtype_to = getattr(mx, target)
    is_cast = getattr(model, "cast_predicate", lambda _: True)

    def casted(name: str, value: mx.array) -> mx.array:
        is_floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype_to) if is_floating and is_cast(name) else value

    model.update(tree_map_with_path(casted, model.parameters()))
    return model, config_json.with_dtype(config, target)


def fetch(name: str, *, key: str, trust_key: str) -> Path:
    """Return the folder of a model on the hub, from the local cache or downloaded.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        key: the setting that names it, for messages.
        trust_key: the setting that allows its Python code to run, for messages.

    Raises:
        ArtifactError: it is no model folder, or needs code that is not trusted.
        SourceError: it cannot be downloaded.
    """
    folder = hub.fetch(name, patterns=model_files.HUB_PATTERNS, key=key)
    files = model_files.find(folder)
    if files.problem:
        raise ArtifactError(f'{key} = "{name}": {files.problem}. {files.advice}')
    if files.code and not remote_code.trusts_code():
        raise ArtifactError(
            f'{key} = "{name}": {model_code.untrusted_code_message(model_files.CONFIG, files.code, trust_key)}'
        )
    return folder


def num_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters: tied ones once, quantized ones as dense, without adapters."""
    modules = dict(model.named_modules())
    count = 0
    for name, value in tree_flatten(model.parameters()):
        path, _, own = name.rpartition(".")
        layer = modules.get(path, {})
        if own in ("scales", "biases") and "scales" in layer:
            continue
        if "lora_a" in layer or "lora_a" in path.split(".") or "lora_b" in path.split("."):
            continue
        count += value.size * 32 // modules[path].bits if own == "weight" and "scales" in layer else value.size
    return count


def num_bytes(model: nn.Module) -> int:
    """Return the size in bytes of a model's parameters in memory."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))
