"""A model folder with adapters is opened with them or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import adapter_files, model_folder, quantized_layers
from mlxflow.training.adapters import add_adapters, save_adapters
from mlxflow.training.settings import AdapterShape
from tests.small_models import llama

TOKENS = mx.arange(1, 7)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with LoRA beside its attention."""
    model, config = llama()
    shape = AdapterShape("lora", 4, 20.0, 0.5, 0, ("self_attn.*",))
    adapter_config = add_adapters(model, shape, seed=1, key="train.lora.keys")
    for layer in adapter_files.layers_of(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.1)
    files = [tmp_path / name for name in ("adapters.safetensors", "adapter_config.json")]
    save_adapters(model, adapter_config, weights_file=files[0], config_file=files[1], provenance={})
    model_folder.save(
        model=adapter_files.take_out(model),
        config=config,
        config_file=tmp_path / "config.json",
        model_file=tmp_path / "model.safetensors",
        provenance={},
    )
    return tmp_path


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_adapters_are_loaded_as_by_mlx_lm_without_dropout(folder: Path) -> None:
    from mlx_lm.utils import load_adapters, load_model

    model, _ = model_folder.load(folder)
    expected = load_adapters(load_model(folder)[0], str(folder))
    expected.eval()
    assert mx.array_equal(model(TOKENS), expected(TOKENS)).item()
    assert mx.array_equal(model(TOKENS), model(TOKENS)).item()
    assert not mx.allclose(model(TOKENS), load_model(folder)[0](TOKENS), atol=1e-2).item()


def test_a_fused_model_computes_the_same(folder: Path) -> None:
    model, config = model_folder.load(folder, lazy=True)
    expected = model(TOKENS)
    dense, _ = quantized_layers.made_dense(model, config)
    assert not adapter_files.layers_of(dense)
    # logits near 1, chains of some thirty roundings
    assert mx.allclose(dense(TOKENS), expected, rtol=0, atol=30 * 2**-23).item()


def test_parameters_are_those_of_the_model_without_adapters(folder: Path) -> None:
    assert model_folder.num_parameters(model_folder.load(folder)[0]) == model_folder.num_parameters(llama()[0])


def test_packed_weights_are_counted_as_weights() -> None:
    import mlx.nn as nn

    model, _ = llama(hidden_size=64, intermediate_size=64)
    count = model_folder.num_parameters(model)
    nn.quantize(model, group_size=32, bits=3)
    assert model_folder.num_parameters(model) == count


def _problem(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(folder)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("missing", "there"),
    [("adapters.safetensors", "adapter_config.json"), ("adapter_config.json", "adapters.safetensors")],
)
def test_one_file_without_the_other_is_refused(folder: Path, missing: str, there: str) -> None:
    (folder / missing).unlink()
    assert _problem(folder) == f"{missing}: missing beside {there}. Build it again, or remove {there}."


def test_an_artifact_that_lost_both_files_is_refused(folder: Path) -> None:
    for name in ("adapters.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    model_folder.load(folder)  # a model folder like any other
    (folder / "report.toml").write_text('fuse = "never"\n')
    assert _problem(folder) == (
        f"{folder}: adapters.safetensors and adapter_config.json are missing: without them it is not the trained "
        "model. Build it again."
    )


def test_an_adapter_without_weights_is_refused(folder: Path) -> None:
    stored: Any = mx.load(str(folder / "adapters.safetensors"))
    mx.eval(stored)
    name = sorted(stored)[0]
    stored.pop(name)
    mx.save_safetensors(str(folder / "adapters.safetensors"), stored)
    assert _problem(folder) == f"adapters.safetensors: has no {name}. Build it again."


def test_adapters_of_another_rank_are_refused(folder: Path) -> None:
    _edit_config(folder, lambda config: config["lora_parameters"].update(rank=2))
    assert _problem(folder).startswith("adapters.safetensors: does not fit the model (Adapter at ")


def test_adapters_of_another_form_are_refused(folder: Path) -> None:
    _edit_config(folder, lambda config: config.update(peft_type="LORA"))
    assert _problem(folder) == (
        "adapter_config.json: is of PEFT's form, which mlx-lm does not read. Merge the adapter into the model, or move "
        "its files away."
    )


def test_an_unreadable_config_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")
    assert _problem(folder) == "adapter_config.json: expected a table. Build it again."
