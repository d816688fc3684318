"""Write the model of a folder again, in shards of a bounded size with an index, as hubs and transformers expect."""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxflow.models import adapter_files, model_folder, quantized_layers, tokenizer_files
from mlxflow.storage import config_json, model_files, tensor_writing


def shards_of(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the tensors of each shard, in the order of their names.

    Args:
        sizes: in bytes, by name; a tensor larger than the limit gets a shard of its own.
        max_bytes: of a shard.
    """
    shards: list[list[str]] = []
    left = 0
    for name in sorted(sizes):
        if not shards or sizes[name] > left:
            shards.append([])
            left = max_bytes
        shards[-1].append(name)
        left -= sizes[name]
    return shards


def write(folder: Path, into: Path, *, max_bytes: int, provenance: Mapping[str, str]) -> int:
    """Write a model folder in shards, and return the number of parameters.

    Adapters beside the model are fused; those beside quantized weights make their layers dense.

    Args:
        folder: a model folder.
        into: the folder to write.
        max_bytes: of a shard.
        provenance: for the headers of the shards.

    Raises:
        ArtifactError: the folder holds no model, or no tokenizer.
    """
    model, config = model_folder.load(folder, lazy=True)
    if adapter_files.layers_of(model):
        model, config = quantized_layers.made_dense(model, config)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shards = shards_of({name: value.nbytes for name, value in weights.items()}, max_bytes)
    metadata = {"format": "mlx"} | tensor_writing.provenance_metadata(provenance)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = model_files.WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensor_writing.write_tensors(into / file, {name: weights.pop(name) for name in names}, metadata)
        places |= dict.fromkeys(names, file)
    size = sum(file.stat().st_size for file in into.glob("model*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (into / model_files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config_json.write(into / model_files.CONFIG, config)
    tokenizer_files.copy_companions(folder, into)
    return model_folder.num_parameters(model)
