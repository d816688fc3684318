"""Model folders in shards."""

import json
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlxflow.models import sharded_folder
from mlxflow.storage import model_files
from tests.models import gguf_models


def test_shards_hold_as_many_tensors_as_fit() -> None:
    sizes = {"b": 4, "a": 3, "c": 9, "d": 1, "e": 1}
    assert sharded_folder.shards_of(sizes, 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert sharded_folder.shards_of({}, 7) == []


def test_a_model_in_shards_is_the_same_model(tmp_path: Path) -> None:
    folder, into, whole = (tmp_path / name for name in ("model", "into", "whole"))
    for one in (folder, into, whole):
        one.mkdir()
    gguf_models.write_model(folder, "qwen3")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    number = sharded_folder.write(folder, into, max_bytes=100_000, provenance={})
    files = model_files.find(into)
    assert files.problem == ""
    assert len(files.weights) > 3
    assert all((into / name).stat().st_size < 110_000 for name in files.weights)
    weights: dict[str, mx.array] = {}
    for name in files.weights[1:]:
        weights |= cast("dict[str, mx.array]", mx.load(str(into / name)))
    expected = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    assert weights.keys() == expected.keys() == json.loads((into / files.weights[0]).read_text())["weight_map"].keys()
    assert all(mx.array_equal(weights[name], expected[name]).item() for name in weights)
    assert number == sum(value.size for value in expected.values())
    assert mx.array_equal(gguf_models.logits(into), gguf_models.logits(folder)).item()
    assert (into / "chat_template.jinja").is_file()
    sharded_folder.write(folder, whole, max_bytes=1 << 30, provenance={})
    assert model_files.find(whole).weights == ["model.safetensors.index.json", "model.safetensors"]
