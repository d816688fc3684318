"""The packed file: the same bytes in one piece and in many, from memory and from the file's rows."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder
from mlxflow.quantization import streaming_export
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.streaming_export import Exported
from tests.small_models import llama, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, config = llama(
        vocab_size=101, hidden_size=64, intermediate_size=192, tie_word_embeddings=False
    )  # rows that no piece divides
    model.set_dtype(mx.bfloat16)
    files = {"config_file": tmp_path / "config.json", "model_file": tmp_path / "model.safetensors"}
    model_folder.save(model=model, config=config | {"torch_dtype": "bfloat16"}, provenance={}, **files)
    return tmp_path


def _export(folder: Path, setting: Setting, *, by_rows: bool) -> tuple[Exported, bytes]:
    model, _ = model_folder.load(folder, lazy=True)
    plan = {path: setting for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}
    file = folder / "packed.safetensors"
    told = streaming_export.export(
        model,
        plan,
        file=file,
        metadata={},
        packed=lambda _: None,
        stored=model_folder.stored_matrices(folder, model) if by_rows else {},
        source="here",
        watch=lambda _: None,
    )
    return told, file.read_bytes()


@pytest.mark.parametrize("setting", [Setting("affine", 3, 32), Setting("symmetric", 4, 64), Setting("mxfp8", 8, 32)])
def test_streaming_by_pieces_and_rows_gives_the_bytes_of_a_whole_export(
    folder: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = _export(folder, setting, by_rows=False)
    monkeypatch.setattr(streaming_export, "_NUMBERS_AT_ONCE", 640)
    for by_rows in (False, True):
        told, found = _export(folder, setting, by_rows=by_rows)
        assert found == expected
        for one, other in zip(told.layers, whole.layers, strict=True):
            assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)
            assert one.num_bytes == other.num_bytes


def test_a_non_finite_weight_is_named_when_streaming_by_rows(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["lm_head.weight"][100, 3] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ArtifactError, match=r"here: lm_head\.weight: 1 of 6,464 values are not finite"):
        _export(folder, Setting("affine", 4, 64), by_rows=True)


def test_tensors_that_the_architecture_changes_on_loading_are_not_read_by_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_folder.load(folder, lazy=True)
    assert "lm_head.weight" in model_folder.stored_matrices(folder, model)

    def sanitize(_: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        changed = {name: value for name, value in weights.items() if "embed" not in name}
        return changed | {"lm_head.weight": weights["lm_head.weight"] + 1}

    monkeypatch.setattr(type(model), "sanitize", sanitize)
    names = model_folder.stored_matrices(folder, model)
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" not in names
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_an_architecture_that_removes_its_head_on_loading_is_read_by_rows(tmp_path: Path) -> None:
    config = config_of("gemma3_text")
    save_model(model_folder.build(config, seed=0), config, tmp_path)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    tied = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    assert len(tied) < len(weights)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tied, {"format": "mlx"})
    model, _ = model_folder.load(tmp_path, lazy=True)
    matrices = {name for name, value in tied.items() if value.ndim > 1}
    assert model_folder.stored_matrices(tmp_path, model).keys() == matrices
