"""Adapters in the formats of PEFT and llama.cpp; tests/journey opens them with both."""

import json
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import adapter_export, model_folder
from tests.models import gguf_models


def write_adapted(folder: Path, name: str, method: str) -> None:
    """Write a model folder with random adapters beside the model."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    gguf_models.write_model(folder, name)
    model = model_folder.load(folder)[0]
    keys = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
    config = {
        "fine_tune_type": method,
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys},
    }
    model.freeze()
    linear_to_lora_layers(model, 2, config["lora_parameters"], use_dora=method == "dora")
    weights = {}
    for path, layer in model.named_modules():
        for own in ("lora_a", "lora_b", "m"):
            if own in layer:
                noise = 0.2 * mx.random.normal(layer[own].shape, key=mx.random.key(len(path) + layer[own].size))
                weights[f"{path}.{own}"] = layer[own] + noise
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_peft_gets_transposed_factors_and_alpha(tmp_path: Path) -> None:
    write_adapted(tmp_path, "llama", "lora")
    adapters = adapter_export.read(tmp_path, "model")
    files = {"weights_file": tmp_path / "adapter_model.safetensors", "config_file": tmp_path / "peft.json"}
    adapter_export.write_peft(adapters, base="base", **files)
    config = json.loads((tmp_path / "peft.json").read_text())
    expected = {"r": 4, "lora_alpha": 12.0, "use_dora": False, "base_model_name_or_path": "base", "peft_type": "LORA"}
    assert {name: config[name] for name in expected} == expected
    assert "model.layers.1.self_attn.k_proj" in config["target_modules"]
    own = cast("dict[str, mx.array]", mx.load(str(tmp_path / "adapters.safetensors")))
    written = cast("dict[str, mx.array]", mx.load(str(tmp_path / "adapter_model.safetensors")))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert mx.array_equal(written[name], own["model.layers.0.mlp.up_proj.lora_a"].T).item()
    assert len(written) == len(own) == 12


def test_the_magnitudes_of_dora_are_written_for_peft_and_refused_for_llama_cpp(tmp_path: Path) -> None:
    write_adapted(tmp_path, "llama", "dora")
    adapters = adapter_export.read(tmp_path, "model")
    files = {"weights_file": tmp_path / "adapter_model.safetensors", "config_file": tmp_path / "peft.json"}
    adapter_export.write_peft(adapters, base="base", **files)
    names = cast("dict[str, mx.array]", mx.load(str(tmp_path / "adapter_model.safetensors"))).keys()
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector" in names
    with pytest.raises(ArtifactError) as caught:
        adapter_export.write_gguf(adapters, tmp_path, tmp_path / "adapter.gguf", key="model")
    assert str(caught.value) == 'model: has adapters of the method "dora", and llama.cpp reads only "lora".'


def test_llama_cpp_gets_the_rows_of_q_in_its_order(tmp_path: Path) -> None:
    write_adapted(tmp_path, "llama", "lora")
    adapters = adapter_export.read(tmp_path, "model")
    assert adapter_export.write_gguf(adapters, tmp_path, tmp_path / "adapter.gguf", key="model") == "llama"
    reader = GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 12.0)
    tensors = {one.name: np.array(one.data) for one in reader.tensors}
    own = np.array(adapters.weights["model.layers.0.self_attn.q_proj", "lora_b"].T)
    expected = own.reshape(4, 2, 16, 4).swapaxes(1, 2).reshape(128, 4)
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_b"], expected)
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 64)


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        adapter_export.read(tmp_path, 'export.model = "train"')
    assert str(caught.value) == (
        'export.model = "train": has no adapters. Train it with method = "lora", or export it with format = "mlx".'
    )
