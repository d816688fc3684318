"""Model folders that others made: what is opened, what is refused, and what the config says afterwards."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder, quantized_layers
from mlxflow.storage import config_json
from tests.models.spoilt_folders import NORM, spoil

TEXT = config_of("llama") | {"model_type": "llama", "tie_word_embeddings": False}
VISION = {"hidden_size": 32, "model_type": "siglip_vision_model"}

#: Models of images and text that mlx-lm opens as models of text: config, and names of weights that it drops.
WRAPPERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gemma3": (
        {"text_config": config_of("gemma3_text"), "vocab_size": 128},
        ("vision_tower.embed.weight", "multi_modal_projector.weight"),
    ),
    "qwen2_vl": ({"text_config": config_of("qwen2")}, ("vision_tower.patch.weight",)),
    "qwen3_vl": ({"text_config": config_of("qwen3")}, ("vision_tower.patch.weight",)),
    "mistral3": ({"text_config": TEXT}, ("vision_tower.patch.weight", "multi_modal_projector.weight")),
    "pixtral": ({"text_config": TEXT}, ("vision_tower.patch.weight", "multi_modal_projector.weight")),
    "kimi_vl": ({"text_config": config_of("deepseek_v3")}, ("vision_tower.patch.weight",)),
}


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    """Write a model folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def weights_of(config: dict[str, Any]) -> dict[str, mx.array]:
    """Return random weights for a config."""
    return cast("dict[str, mx.array]", dict(tree_flatten(model_folder.build(config, seed=0).parameters())))


def save_again(folder: Path, to: Path) -> dict[str, Any]:
    """Open a folder, write what was opened, and return the config that was written."""
    model, config = model_folder.load(folder)
    to.mkdir()
    model_folder.save(
        model=model, config=config, config_file=to / "config.json", model_file=to / "model.safetensors", provenance={}
    )
    return config_json.read(to)


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_a_config_names_no_vision_where_its_weights_were_dropped(architecture: str, tmp_path: Path) -> None:
    table, dropped = WRAPPERS[architecture]
    config = {"model_type": architecture, "torch_dtype": "float32", **json.loads(json.dumps(table))}
    weights = weights_of(config)
    extra = {"vision_config": VISION, "audio_config": VISION, "image_token_index": 7, "_name_or_path": "somewhere"}
    given = write_folder(tmp_path / "given", config | extra, weights | {name: mx.ones((4, 4)) for name in dropped})
    written = save_again(given, tmp_path / "written")
    assert not {"vision_config", "audio_config", "_name_or_path"} & set(written)
    assert written["image_token_index"] == 7
    model, again = model_folder.load(tmp_path / "written")
    assert {name for name, _ in tree_flatten(model.parameters())} == set(weights)
    assert again == written


# --- weights that were packed by others


def as_fp8(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return weights with the matrices of the blocks in fp8, scaled by blocks of 128 x 128, as DeepSeek's are."""
    packed: dict[str, mx.array] = {}
    for name, value in weights.items():
        if "proj" not in name or value.ndim != 2:
            packed[name] = value.astype(mx.bfloat16)
            continue
        rows, columns = (-(-length // 128) for length in value.shape)
        packed[name] = mx.to_fp8(value * 8)
        packed[f"{name}_scale_inv"] = mx.full((rows, columns), 1 / 8)
    return packed


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("nested", [False, True])
def test_fp8_weights_are_dequantized_and_the_config_follows(tmp_path: Path, *, nested: bool) -> None:
    config = config_of("deepseek_v3") | {"torch_dtype": "bfloat16"}
    weights = weights_of(config)
    told: dict[str, Any] = {"text_config": {"quantization_config": FP8}} if nested else {"quantization_config": FP8}
    given = write_folder(tmp_path / "given", config | told, as_fp8(weights))
    written = save_again(given, tmp_path / "written")
    assert "quant" not in json.dumps(written)
    model, _ = model_folder.load(tmp_path / "written")
    assert not quantized_layers.is_quantized(model)
    for name, value in tree_flatten(model.parameters()):
        assert value.dtype in (mx.bfloat16, mx.float32), name
        assert float(mx.abs(value - weights[name]).max()) <= 0.07 * float(mx.abs(weights[name]).max()), name


@pytest.mark.parametrize(
    ("method", "told"),
    [("fp8", FP8), ("compressed-tensors", {"quant_method": "compressed-tensors", "format": "float-quantized"})],
)
def test_packed_weights_that_mlx_lm_cannot_read_are_refused_by_name(
    tmp_path: Path, method: str, told: dict[str, Any]
) -> None:
    config = config_of("llama")
    given = write_folder(tmp_path / "given", config | {"quantization_config": told}, as_fp8(weights_of(config)))
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(given)
    said = str(caught.value)
    assert said.startswith(
        f'{given}/config.json: quantization_config.quant_method = "{method}": mlx-lm does not read weights of llama '
        "that are packed so ("
    )
    assert said.endswith(" Convert the model to bf16 first.")


def _awq(weight: mx.array) -> dict[str, mx.array]:
    """Return a random matrix of a weight's shape as AutoAWQ packs it: 4 bits, groups of 32, columns in its order."""
    rows, columns = weight.shape
    codes = mx.random.randint(0, 16, (columns, rows), key=mx.random.key(rows)).astype(mx.uint32)
    order = mx.array([0, 4, 1, 5, 2, 6, 3, 7], mx.uint32) * 4
    qweight = (codes.reshape(columns, rows // 8, 8) << order).sum(axis=-1).astype(mx.int32)
    zeros = mx.full((columns // 32, rows // 8), 0x88888888, mx.uint32).view(mx.int32)
    return {"qweight": qweight, "qzeros": zeros, "scales": mx.full((columns // 32, rows), 0.01, mx.float16)}


def test_a_model_of_autoawq_is_quantized_and_its_config_becomes_mlx_lms(tmp_path: Path) -> None:
    config = config_of("llama")
    weights: dict[str, mx.array] = {}
    for name, value in weights_of(config).items():
        if ".layers." in name and value.ndim == 2:
            weights |= {name.replace("weight", part): own for part, own in _awq(value).items()}
        else:
            weights[name] = value.astype(mx.float16)
    told = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    given = write_folder(tmp_path / "given", config | {"quantization_config": told}, weights)
    written = save_again(given, tmp_path / "written")
    assert written["quantization"] == written["quantization_config"] == {"group_size": 32, "bits": 4}
    (first, _), (second, _) = model_folder.load(given), model_folder.load(tmp_path / "written")
    assert quantized_layers.is_quantized(first)
    assert mx.array_equal(first(mx.arange(8)[None]), second(mx.arange(8)[None]))


def test_a_new_model_that_cannot_fit_is_refused_before_a_weight_is_made() -> None:
    config = config_of("llama") | {"hidden_size": 2**16, "intermediate_size": 2**16}
    with pytest.raises(ArtifactError) as caught:
        model_folder.require_room(config, 10**9, "train.model", limit_key="workflow.memory_limit")
    assert str(caught.value).startswith("train.model: its weights take ")
    assert str(caught.value).endswith(
        " GB, memory limit 1.00 GB. Make the model smaller, or raise workflow.memory_limit."
    )
    model_folder.require_room(config_of("llama"), 10**9, "train.model", limit_key="workflow.memory_limit")


def test_weights_of_another_shape_are_refused(llama_folder: Path) -> None:
    line = spoil(llama_folder, NORM, mx.ones((63,)))
    assert line.startswith("model: cannot be opened as a model (")
    assert NORM in line
    assert "\n" not in line
