"""GGUF files as model folders; see test_gguf_writing for files of every architecture."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_reading, gguf_writing, model_folder
from mlxflow.models.gguf_writing import GgufRequest
from tests.models import gguf_models


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A quantized Llama as a GGUF file."""
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_models.write_model(folder, "llama", dtype=mx.float16)
    path = tmp_path / "model.gguf"
    gguf_writing.write(folder, path, GgufRequest("q4_0", "auto", "small", "", "model"))
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "back"
    folder.mkdir()
    return folder


def test_a_quantized_file_becomes_a_dense_folder_in_fp16(file: Path, into: Path) -> None:
    gguf_reading.write_folder(file, into, key="model.gguf")
    config = json.loads((into / "config.json").read_text())
    expected = {"torch_dtype": "float16", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": [2, 0]}
    assert {name: config[name] for name in expected} == expected
    original, back = gguf_models.logits(file.parent / "model"), gguf_models.logits(into)
    assert 0.9 < np.corrcoef(np.array(original).ravel(), np.array(back).ravel())[0, 1] < 1  # four bits of noise
    model, _ = model_folder.load(into)
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float16


@pytest.mark.parametrize("kind", ["q4_0", "f16"])
def test_gemma_is_computed_in_bf16_because_its_activations_exceed_fp16(
    tmp_path: Path, into: Path, kind: Literal["q4_0", "f16"]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_models.write_model(folder, "gemma3_text", dtype=mx.float16)
    gguf_writing.write(folder, tmp_path / "model.gguf", GgufRequest(kind, "auto", "small", "", "model"))
    gguf_reading.write_folder(tmp_path / "model.gguf", into, key="model.gguf")
    assert json.loads((into / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model, _ = model_folder.load(into)
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16


def test_files_that_are_no_model_are_refused(file: Path, into: Path) -> None:
    for data, message in (
        (b"GGML" + file.read_bytes()[4:], "cannot be read as GGUF"),
        (file.read_bytes()[:10_000], "cannot be read as GGUF"),
        (file.read_bytes()[:-5000], "cannot be read as GGUF"),
        (b"", "cannot be read as GGUF"),
    ):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=message) as caught:
            gguf_reading.write_folder(file, into, key="model.gguf")
        assert len(str(caught.value).splitlines()) == 1
        assert not list(into.iterdir())


def test_a_tensor_without_a_place_is_refused(file: Path, into: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    _copy_with(file, other, "blk.0.attn_sinks.weight")
    with pytest.raises(ArtifactError, match=r"^other.gguf: its tensor blk.0.attn_sinks.weight has no place in llama"):
        gguf_reading.write_folder(other, into, key="other.gguf")
    assert not (into / "config.json").exists()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, 'a rotary embedding scaled by "yarn"'),
        ({"rope.scaling.type": "longrope"}, 'a rotary embedding scaled by "longrope"'),
        (
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            'a rotary embedding scaled by "none" with the factor 4',
        ),
        ({"rope.dimension_count": 4}, "a rotary embedding of 4 of 32 numbers of a head"),
    ],
)
def test_a_rotary_embedding_that_the_folder_cannot_have_is_refused(
    file: Path, into: Path, tmp_path: Path, changed: dict[str, Any], problem: str
) -> None:
    other = tmp_path / "other.gguf"
    _copy_with(file, other, "output_norm.weight", changed)
    with pytest.raises(ArtifactError) as caught:
        gguf_reading.write_folder(other, into, key="other.gguf")
    assert str(caught.value) == (
        f"other.gguf: its header has {problem}, which cannot be read. Use the original model folder."
    )
    assert not list(into.iterdir())


def _copy_with(file: Path, other: Path, name: str, changed: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write a file with the fields of another one, some of them changed or added, and a single tensor."""
    from gguf import GGUFReader, GGUFValueType

    writer = GGUFWriter(other, "llama")
    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
    for name_of_value, value in changed.items():
        writer.add_key_value(f"llama.{name_of_value}", value, kinds[type(value)])
    for key, field in GGUFReader(file).fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key.removeprefix("llama.") in changed:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
