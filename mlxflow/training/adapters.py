"""Low-rank adapters (LoRA, DoRA): add mlx-lm's layers to a model, continue existing ones, save them for mlx-lm."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.messages import terminal
from mlxflow.messages.errors import WorkflowError
from mlxflow.models import adapter_files
from mlxflow.ops import dora_order, mlx_lm_import
from mlxflow.storage import tensor_writing
from mlxflow.storage.toml_tables import toml_value
from mlxflow.training.settings import AdapterShape


def add_adapters(model: nn.Module, shape: AdapterShape, *, seed: int, key: str) -> dict[str, Any]:
    """Freeze a model and put adapters beside some of its layers.

    Args:
        model: dense or quantized; changed.
        shape: of the adapters.
        seed: of their initial weights; the global random state is set by it.
        key: the setting with the patterns, for the message.

    Returns:
        the `adapter_config.json` by which mlx-lm builds the same layers.

    Raises:
        WorkflowError: a pattern names no layer; the message lists those there are.
    """
    add_layers = mlx_lm_import.tuner_utils().linear_to_lora_layers
    config = _config_of(model, shape, key)
    if left_out := _left_out(model, shape):
        terminal.say(f"{key}: DoRA has no form for experts, so none lie beside {', '.join(left_out)}")
    model.freeze()
    dora_order.install()
    mx.random.seed(seed)
    try:
        add_layers(model, config["num_layers"], config["lora_parameters"], use_dora=shape.method == "dora")
    except ValueError as error:
        raise WorkflowError(f"{key}: {error}. Name other layers, or use another method.") from error
    for layer in adapter_files.layers_of(model).values():  # DoRA's norms dequantize a matrix: one at a time
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    return config


def continue_adapters(model: nn.Module, shape: AdapterShape, *, folder: Path, task: str) -> dict[str, Any]:
    """Freeze a model except for the adapters that it has, to continue their training.

    Args:
        model: of `model_folder.load`, with the adapters of its folder; changed in place.
        shape: expected of the adapters; their dropout is set to that of the shape.
        folder: of the model; its `adapter_config.json` is compared with the shape.
        task: the stage with the settings, for the message.

    Returns:
        the `adapter_config.json` by which mlx-lm builds the same layers.

    Raises:
        WorkflowError: the adapters have another shape.
    """
    config = _config_of(model, shape, f"{task}.lora.keys")
    there = adapter_files.read_config(folder)
    own: dict[str, Any] = there.get("lora_parameters", {})
    pairs = {
        "method": (shape.method, there.get("fine_tune_type", "lora")),
        "lora.rank": (shape.rank, own.get("rank")),
        "lora.scale": (shape.scale, own.get("scale")),
    }
    for setting, (expected, existing) in pairs.items():
        if expected != existing:
            raise WorkflowError(
                f"{task}.{setting} = {toml_value(expected)}: {folder} has adapters with {toml_value(existing)}, and "
                f"these are trained further. Set {task}.{setting} = {toml_value(existing)}, or name a model without "
                "adapters."
            )
    if set(_chosen_layers(model, config)) != set(adapter_files.layers_of(model)):
        raise WorkflowError(
            f"{task}.lora: {folder} has adapters beside other layers than lora.keys and lora.num_layers name, and "
            "these are trained further. Restore both, or name a model without adapters."
        )
    _train_only(model)
    for layer in adapter_files.layers_of(model).values():
        layer.dropout = nn.Dropout(p=shape.dropout)
    return config


def ensure_adapters(model: nn.Module, shape: AdapterShape, *, seed: int, key: str) -> None:
    """Freeze a model except for its adapters; add new ones if it has none.

    Args:
        model: changed in place.
        shape: of new adapters.
        seed: of their initial weights.
        key: the setting with the patterns, for the message.

    Raises:
        WorkflowError: a pattern names no layer.
    """
    if adapter_files.layers_of(model):
        _train_only(model)
    else:
        add_adapters(model, shape, seed=seed, key=key)


def _train_only(model: nn.Module) -> None:
    """Freeze a model except for the adapters that it has."""
    model.freeze()
    dora_order.install()
    for layer in adapter_files.layers_of(model).values():
        layer.unfreeze(keys=list(adapter_files.PARAMETERS), recurse=False)


def _config_of(model: nn.Module, shape: AdapterShape, key: str) -> dict[str, Any]:
    """Return the `adapter_config.json` of a shape for a model, with the names of the layers.

    Raises:
        WorkflowError: a pattern names no layer; the message lists those there are.
    """
    names = {name for block in model.layers for name in _adaptable(block, shape.method)}
    experts = _experts(model) if shape.method == "dora" else []
    for pattern in shape.keys:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        known = f"Known: {', '.join(sorted(names))}."
        if any(fnmatchcase(name, pattern) for name in experts):
            raise WorkflowError(f'{key}: "{pattern}" names only experts, for which DoRA has no form. {known}')
        raise WorkflowError(f'{key}: "{pattern}" names no layer. {known}')
    chosen = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in shape.keys))
    parameters = {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout, "keys": chosen}
    num_layers = shape.num_layers or len(model.layers)
    return {"fine_tune_type": shape.method, "num_layers": num_layers, "lora_parameters": parameters}


def _adaptable(block: nn.Module, method: str) -> set[str]:
    """Return the names of the layers within a block that can have an adapter, or have one."""
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    if method != "dora":
        kinds += _expert_kinds()
    adapted = set(adapter_files.layers_of(block))
    names = {name for name, layer in block.named_modules() if isinstance(layer, kinds)}
    return {name for name in names if name.rpartition(".")[0] not in adapted} | adapted


def _expert_kinds() -> tuple[type[nn.Module], ...]:
    mlx_lm_import.prepare()
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return SwitchLinear, QuantizedSwitchLinear


def _experts(model: nn.Module) -> list[str]:
    """Return the names of the layers within blocks that hold a matrix for each expert."""
    kinds = _expert_kinds()
    return sorted({name for block in model.layers for name, layer in block.named_modules() if isinstance(layer, kinds)})


def _left_out(model: nn.Module, shape: AdapterShape) -> list[str]:
    """Return the names of the layers that the patterns match and for which the method has no adapter."""
    experts = _experts(model) if shape.method == "dora" else []
    return [name for name in experts if any(fnmatchcase(name, pattern) for pattern in shape.keys)]


def _chosen_layers(model: nn.Module, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of the layers that get adapters by a config."""
    chosen = set(config["lora_parameters"]["keys"])
    last = model.layers[-config["num_layers"] :]
    blocks = {path: block for path, block in model.named_modules() if any(block is one for one in last)}
    for path, block in blocks.items():
        yield from (f"{path}.{name}" for name in chosen & _adaptable(block, config["fine_tune_type"]))


def save_adapters(
    model: nn.Module, config: Mapping[str, Any], *, weights_file: Path, config_file: Path, provenance: Mapping[str, str]
) -> None:
    """Write the two files of an adapter folder, as `mlx_lm.generate --adapter-path` reads it.

    Args:
        model: with adapters; its trainable parameters are saved.
        config: the `adapter_config.json`.
        weights_file: gets the weights, as safetensors.
        config_file: gets the config.
        provenance: for the header of the weights.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    tensor_writing.write_tensors(weights_file, weights, tensor_writing.provenance_metadata(provenance))
    config_file.write_text(json.dumps(dict(sorted(config.items())), indent=4) + "\n")
