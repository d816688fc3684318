"""Write LoRA adapters in the formats of other programs: PEFT's, and GGUF for llama.cpp.

mlx-lm computes x W + scale * (x A) B with A (N, R) and B (R, M); PEFT and llama.cpp hold the transposed factors, and
multiply by alpha / R. DoRA's magnitudes are the same in PEFT; llama.cpp has none.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import adapter_files, gguf_architectures
from mlxflow.storage import config_json, model_files, tensor_writing
from mlxflow.storage.host_arrays import numpy_of

# Names in PEFT's file, by mlx-lm's
_PEFT_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


class Adapters(NamedTuple):
    """The adapters of a model folder.

    Attributes:
        weights: by the layer's path and the name of the parameter; see `adapter_files.PARAMETERS`.
        rank: columns of the factors.
        scale: factor of their product.
        dropout: share of the inputs zeroed in training.
        method: "lora" or "dora".
    """

    weights: dict[tuple[str, str], mx.array]
    rank: int
    scale: float
    dropout: float
    method: str

    @property
    def layers(self) -> list[str]:
        """The paths of the adapted layers, sorted."""
        return sorted({path for path, _ in self.weights})

    @property
    def alpha(self) -> float:
        """What the programs divide by the rank."""
        return self.scale * self.rank


def read(folder: Path, key: str) -> Adapters:
    """Return the adapters of a model folder: those beside the model, or the copy of fused ones.

    Args:
        folder: of the model.
        key: names the model in messages.

    Raises:
        ArtifactError: there are none, they cannot be read, or some are matrices of experts, which only mlx-lm adapts.
    """
    places = (folder, folder / model_files.ADDED_ADAPTERS)
    place = next((one for one in places if (one / adapter_files.WEIGHTS).is_file()), None)
    if place is None:
        raise ArtifactError(f'{key}: has no adapters. Train it with method = "lora", or export it with format = "mlx".')
    config = adapter_files.read_config(place)
    parameters: dict[str, Any] = config.get("lora_parameters") or {}
    stored: dict[str, mx.array] = dict(mx.load(str(place / adapter_files.WEIGHTS)))  # type: ignore[arg-type]
    weights = {(name.rpartition(".")[0], name.rpartition(".")[2]): value for name, value in stored.items()}
    for (path, _), value in sorted(weights.items()):
        if value.ndim > 2:
            raise ArtifactError(
                f"{key}: {path} is a matrix for each expert, whose adapters only mlx-lm reads. Leave experts out of "
                "lora.keys."
            )
    rank = next(value.shape[-1] for (_, own), value in sorted(weights.items()) if own == "lora_a")
    return Adapters(
        weights,
        int(rank),
        float(parameters.get("scale", 20.0)),
        float(parameters.get("dropout", 0.0)),
        str(config.get("fine_tune_type", "lora")),
    )


def write_peft(adapters: Adapters, *, weights_file: Path, config_file: Path, base: str) -> None:
    """Write adapters as `PeftModel.from_pretrained` reads them.

    Args:
        adapters: to write.
        weights_file: `adapter_model.safetensors`.
        config_file: `adapter_config.json`.
        base: folder or name of the model that they were trained on.
    """
    tensors = {
        f"base_model.model.{path}.{_PEFT_NAMES[own]}": mx.contiguous(value.T)
        for (path, own), value in adapters.weights.items()
    }
    tensor_writing.write_tensors(weights_file, tensors, {"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapters.rank,
        "target_modules": adapters.layers,
        "task_type": "CAUSAL_LM",
        "use_dora": adapters.method == "dora",
        "use_rslora": False,
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_gguf(adapters: Adapters, folder: Path, file: Path, *, key: str) -> str:
    """Write adapters as `llama-cli --lora` reads them; return llama.cpp's name of the architecture.

    Args:
        adapters: to write.
        folder: of the model.
        file: the GGUF file.
        key: names the model in messages.

    Raises:
        ArtifactError: llama.cpp does not know the architecture, or has no such adapters.
    """
    from gguf import GGUFWriter

    if adapters.method != "lora":
        raise ArtifactError(f'{key}: has adapters of the method "{adapters.method}", and llama.cpp reads only "lora".')
    config = config_json.read(folder)
    architecture = gguf_architectures.of_config(config, key)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads")}
    writer = GGUFWriter(file, architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapters.alpha)
    for (path, own), value in sorted(adapters.weights.items()):
        name = architecture.tensor_name(f"{path}.weight")
        if not name:
            raise ArtifactError(f"{key}: its layer {path} has no name in llama.cpp's {architecture.name}.")
        factor = numpy_of(value.T.astype(mx.float32))
        kind = name.split(".")[-2]
        if own == "lora_b" and architecture.permutes and kind in heads:
            factor = factor[gguf_architectures.rotary_order(len(factor), heads[kind] or heads["attn_q"])]
        writer.add_tensor(f"{name}.{own}", np.ascontiguousarray(factor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return architecture.name
