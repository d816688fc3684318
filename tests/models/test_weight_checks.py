import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder
from mlxflow.storage.tensor_reading import read_metadata
from tests.models.spoilt_folders import NORM, problem, spoil, write_header
from tests.models.test_model_folder import TEXT, weights_of, write_folder

HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dtype": (lambda header: header[NORM].update(dtype="F99"), f"tensor '{NORM}' is of the unknown type 'F99'"),
    "wide": (
        lambda header: header[NORM].update(dtype="F64"),
        f"tensor '{NORM}' of type F64 and shape [64] has 256 bytes",
    ),
    "shape": (
        lambda header: header[NORM].update(shape=[2**40, 2**40]),
        f"tensor '{NORM}' of type F32 and shape [1099511627776, 1099511627776] has 256 bytes",
    ),
    "negative": (lambda header: header[NORM].update(shape=[-64]), f"tensor '{NORM}' has no valid shape ([-64])"),
    "text": (lambda header: header[NORM].update(shape="64"), f"tensor '{NORM}' has no valid shape ('64')"),
    "overlap": (
        lambda header: header[NORM].update(data_offsets=[0, 256]),
        "does not begin where the one before it ends",
    ),
    "beyond": (lambda header: header[NORM].update(data_offsets=[2**60, 2**60 + 256]), "does not begin where the one"),
    "offsets": (lambda header: header[NORM].update(data_offsets=None), f"tensor '{NORM}' has no valid data_offsets"),
    "entry": (lambda header: header.update({NORM: []}), f"tensor '{NORM}' has no valid data_offsets"),
    "metadata": (lambda header: header.update(__metadata__=[1]), "its __metadata__ is no table of texts"),
    "twice": (
        lambda header: json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}',
        f"its header lists '{NORM}' twice",
    ),
    "deep": (lambda header: "[" * 100_000 + "]" * 100_000, "its header is not valid JSON"),
    "long": (lambda header: json.dumps(header) + " " * 2**24, "bytes, more than 16,777,216"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_named_with_its_tensor(llama_folder: Path, name: str) -> None:
    change, cause = HEADERS[name]
    write_header(llama_folder, change)
    line = problem(llama_folder)
    assert line.startswith("model/model.safetensors: damaged (")
    assert cause in line
    assert "\n" not in line
    with pytest.raises(ArtifactError, match="damaged"):
        read_metadata(llama_folder / "model.safetensors")


def test_integer_weights_are_refused(llama_folder: Path) -> None:
    expected = f"model: {NORM} is of type int32: expected floating numbers. Name another model."
    assert spoil(llama_folder, NORM, mx.ones((64,), mx.int32)) == expected


def test_weights_of_a_type_that_mlx_does_not_read_are_named(llama_folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[NORM].update(dtype="F64", shape=[32])

    write_header(llama_folder, change)
    assert problem(llama_folder) == (
        f"model/model.safetensors: {NORM} is of type F64, which MLX does not read. Convert the model to bf16 first."
    )


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
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
