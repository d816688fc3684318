"""Low-rank adapters through mlx-lm's own layers: put in, saved in mlx-lm's form, fused into the weights."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow import artifact, bare
from mlxflow.errors import WorkflowError


class AdapterShape(NamedTuple):
    """What adapters are like.

    Attributes:
        method: "lora" (Hu et al. 2021, arXiv:2106.09685) or "dora" (Liu et al. 2024, arXiv:2402.09353).
        rank: columns of the low-rank factors.
        scale: what their product is multiplied by.
        dropout: share of the inputs to the adapter that is zeroed in training.
        num_layers: the last so many blocks get one; 0 for all.
        keys: patterns of layers within a block, such as `self_attn.*`.
    """

    method: str
    rank: int
    scale: float
    dropout: float
    num_layers: int
    keys: Sequence[str]


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
    bare.prepare()
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear, nn.Embedding, nn.QuantizedEmbedding)
    names = {name for block in model.layers for name, layer in block.named_modules() if isinstance(layer, kinds)}
    for pattern in shape.keys:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise WorkflowError(f'{key}: "{pattern}" names no layer. Known: {", ".join(sorted(names))}.')
    chosen = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in shape.keys))
    parameters = {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout, "keys": chosen}
    num_layers = shape.num_layers or len(model.layers)
    model.freeze()
    mx.random.seed(seed)
    try:
        linear_to_lora_layers(model, num_layers, parameters, use_dora=shape.method == "dora")
    except ValueError as error:
        raise WorkflowError(f"{key}: {error}. Name other layers, or use another method.") from error
    mx.eval(model.parameters())
    return {"fine_tune_type": shape.method, "num_layers": num_layers, "lora_parameters": parameters}


def save_adapters(
    model: nn.Module, config: Mapping[str, Any], *, weights_file: Path, config_file: Path, provenance: Mapping[str, str]
) -> None:
    """Write what `mlx_lm.generate --adapter-path` reads."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    artifact.write_tensors(weights_file, weights, artifact.provenance_metadata(provenance))
    config_file.write_text(json.dumps(dict(sorted(config.items())), indent=4) + "\n")


def fuse_adapters(model: nn.Module) -> None:
    """Add the adapters into the weights beside them; quantized ones are quantized again with their own settings."""
    fused = [(name, layer.fuse()) for name, layer in model.named_modules() if hasattr(layer, "fuse")]
    model.update_modules(tree_unflatten(fused))
