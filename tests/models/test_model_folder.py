"""Model folders that others made: what is opened, what is refused, and what the config says afterwards."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import config_of
from mlxflow.errors import ArtifactError
from mlxflow.models import config_json, model_code, model_folder, quantized_layers
from mlxflow.ops import mlx_lm_import

TEXT = config_of("llama") | {"model_type": "llama", "tie_word_embeddings": False}
#: Modules of mlx-lm that are no architecture, a module within one, and what is no name of a module.
NO_ARCHITECTURES = ("base", "cache", "switch_layers", "pipeline", "llama.nn", ".llama", "../llama", "os", "")

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


def test_a_config_keeps_the_parts_whose_weights_are_there() -> None:
    config = {"model_type": "muse_spark", "vision_config": VISION, "audio_config": VISION}
    kept = config_json.describing(config, weights=["model.vision_tower.blocks.0.attn.weight"], is_quantized=False)
    assert kept == {"model_type": "muse_spark", "vision_config": VISION}


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
def test_fp8_weights_come_out_dense_and_the_config_says_so(tmp_path: Path, *, nested: bool) -> None:
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


def test_codes_without_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    config = config_of("llama")
    weights = weights_of(config)
    name = "model.layers.1.mlp.up_proj"
    weights[f"{name}.weight"] = mx.to_fp8(weights[f"{name}.weight"])
    given = write_folder(tmp_path / "given", config, weights)
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(given)
    assert str(caught.value) == (
        f"{given}: {name}.weight holds codes (uint8), and mlx-lm takes them for numbers. "
        "Convert the model to bf16 first."
    )


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


def test_every_layer_of_latent_attention_and_of_experts_is_unpacked() -> None:
    from mlx_lm.utils import quantize_model

    config = config_of("deepseek_v3")
    model = model_folder.build(config, seed=0)
    model.eval()
    quantized, told = quantize_model(model, config, 32, 8)
    tokens = mx.arange(8)[None]
    wanted = quantized(tokens)
    made, dense_config = quantized_layers.dequantized(quantized, told)
    assert not quantized_layers.is_quantized(made)
    assert "quantization" not in dense_config
    names = {name for name, _ in tree_flatten(model_folder.build(config, seed=1).parameters())}
    assert {name for name, _ in tree_flatten(made.parameters())} == names
    assert mx.allclose(made(tokens), wanted, atol=1e-4)


def test_dequantizing_names_a_layer_that_cannot_be_unpacked() -> None:
    class BitLinear(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.zeros((2, 8), mx.uint8)

    model = nn.Sequential(BitLinear())
    with pytest.raises(ArtifactError) as caught:
        quantized_layers.dequantized(model, {})
    assert str(caught.value) == "layers.0: mlx-lm cannot unpack a BitLinear. Name a dense model."


# --- the config itself


def test_numbers_that_json_does_not_have_are_written_as_mlx_lm_reads_them(tmp_path: Path) -> None:
    from mlx_lm.utils import load_config

    config = {"a": float("inf"), "b": [float("-inf"), 1.5], "c": {"d": float("inf")}, "n": 1}
    config_json.write(tmp_path / "config.json", config)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("config", "vocabulary", "positions", "ends"),
    [
        ({"vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": [1, 2]}, 5, 6, {1, 2}),
        ({"text_config": {"vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": 1}}, 5, 6, {1}),
        ({"vocab_size": 7, "text_config": {"vocab_size": 5}, "n_positions": 8}, 7, 8, set()),
        ({}, 2**62, 2**62, set()),
    ],
)
def test_settings_of_the_text_model_are_found_wherever_they_stand(
    config: dict[str, Any], vocabulary: int, positions: int, ends: set[int]
) -> None:
    assert config_json.vocab_size(config) == vocabulary
    assert config_json.num_positions(config) == positions
    assert config_json.end_of_text(config) == ends


def test_a_type_is_named_wherever_one_was_named() -> None:
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}, "n": 2}
    assert config_json.with_dtype(config, "float32") == {
        "torch_dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "n": 2,
    }  # fmt: skip
    assert config_json.with_dtype({"n": 1}, "float32") == {"n": 1}


@pytest.mark.parametrize("name", [*NO_ARCHITECTURES, ["llama"], None, 3])
def test_a_model_type_names_an_architecture_and_no_other_module(name: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        model_folder.skeleton(TEXT | {"model_type": name})
    assert str(caught.value) == (
        f"config.json: no architecture that mlx-lm knows (Model type {name} not supported.). Name another model."
    )


def test_every_architecture_and_every_other_name_of_one_is_known() -> None:
    utils = mlx_lm_import.mlx_lm_utils()
    files = sorted(Path(str(utils.__file__)).parent.glob("models/*.py"))
    helpers = {file.stem for file in files if not model_code.is_architecture(file.stem)}
    assert {"__init__", "base", "cache", "mla", "ssm"} <= helpers
    assert len(files) - len(helpers) > 100
    assert not helpers & {*utils.MODEL_REMAPPING.values(), *utils.MODEL_ARCHITECTURE_REMAPPING.values()}
    assert model_folder.skeleton(TEXT | {"model_type": "mistral"}).model_type == "mistral"


def test_an_architecture_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(config: object) -> None:
        raise SystemExit(1)  # as mlx-lm's olmo does

    monkeypatch.setattr(mlx_lm_import.mlx_lm_utils(), "_get_classes", ends)
    with pytest.raises(ArtifactError) as caught:
        model_folder.skeleton({"model_type": "olmo"})
    assert str(caught.value) == (
        "config.json: no architecture that mlx-lm knows (Model type olmo needs a package that is not installed.). "
        "Name another model."
    )


def test_two_shards_with_a_tensor_of_one_name_are_refused(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / "config.json").write_text(json.dumps(TEXT))
    for name in names:
        mx.save_safetensors(str(tmp_path / name), {"model.norm.weight": mx.zeros(4)})
    with pytest.raises(ArtifactError) as caught:
        model_folder.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: {names[0]} and {names[1]} both hold model.norm.weight. Remove one of the two."
    )


def test_a_new_model_that_cannot_fit_is_refused_before_a_weight_is_made() -> None:
    config = config_of("llama") | {"hidden_size": 2**16, "intermediate_size": 2**16}
    with pytest.raises(ArtifactError) as caught:
        model_folder.require_room(config, 10**9, "train.model")
    assert str(caught.value).startswith("train.model: its weights take ")
    assert str(caught.value).endswith(
        " bytes, memory limit 1,000,000,000. Make the model smaller, or raise workflow.memory_limit."
    )
    model_folder.require_room(config_of("llama"), 10**9, "train.model")
