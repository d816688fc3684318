"""GGUF files of every architecture: written, read back as a model folder, and compared with the model."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.models import gguf_blocks, gguf_reading, gguf_writing, model_folder
from mlxflow.models.gguf_writing import GgufRequest
from tests.models import gguf_models

KEY = 'export.model = "train"'


def _write(folder: Path, file: Path, kind: str = "auto", outer: str = "auto") -> gguf_writing.WrittenModel:
    return gguf_writing.write(folder, file, GgufRequest(kind, outer, "small", "apache-2.0", KEY))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_a_model_comes_back_from_its_file_with_equal_logits_and_tokenizer(
    folder: Path, tmp_path: Path, name: str
) -> None:
    gguf_models.write_model(folder, name)
    written = _write(folder, tmp_path / "model.gguf", "f32")
    assert all(one.relative_error == 0 or one.name.endswith("norm.weight") for one in written.tensors)
    back = tmp_path / "back"
    back.mkdir()
    gguf_reading.write_folder(tmp_path / "model.gguf", back, key="model.gguf")
    expected, found = gguf_models.logits(folder), gguf_models.logits(back)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item()
    assert gguf_models.tokenizer_of(back)["model"] == gguf_models.tokenizer_of(folder)["model"]


@pytest.mark.parametrize(
    ("setting", "kinds"),
    [
        ({"bits": 4}, {"q4_1"}),
        ({"bits": 3, "group_size": 64}, {"q4_0", "q4_1"}),  # with few bits MLX's own grids may be symmetric
        ({"bits": 2, "group_size": 64}, {"q4_0", "q4_1"}),
        ({"bits": 5}, {"q5_1"}),
        ({"mode": "mxfp4"}, {"mxfp4"}),
    ],
    ids=["4 bits", "3 bits", "2 bits", "5 bits", "mxfp4"],
)
def test_codes_of_a_quantized_model_are_kept(
    folder: Path, tmp_path: Path, setting: dict[str, Any], kinds: set[str]
) -> None:
    gguf_models.write_model(folder, "llama", dtype=mx.float16)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    gguf_models.quantize(folder, quantized, **setting)
    written = _write(quantized, tmp_path / "model.gguf")
    assert written.file_type in kinds
    matrices = [one for one in written.tensors if one.was_quantized]
    assert len(matrices) == 16  # seven of each block, the embedding and the head
    assert {(one.keeps_codes, one.relative_error) for one in matrices} == {(True, 0.0)}
    assert {one.type for one in matrices} <= kinds


def test_rows_of_q_and_k_are_in_the_order_of_llama_cpp(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "llama", dtype=mx.float16)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    gguf_models.quantize(folder, quantized)
    _write(quantized, tmp_path / "model.gguf")
    found = {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(tmp_path / "model.gguf").tensors}
    layer = model_folder.load(quantized)[0].layers[0].self_attn
    for name, projection, heads in (("attn_q", layer.q_proj, 4), ("attn_k", layer.k_proj, 2)):
        scales, biases = (one.astype(mx.float32) for one in (projection.scales, projection.biases))
        dense = np.array(mx.dequantize(projection.weight, scales, biases, group_size=32, bits=4))
        # convert_hf_to_gguf.py, LlamaModel.permute
        expected = dense.reshape(heads, 2, len(dense) // heads // 2, -1).swapaxes(1, 2).reshape(dense.shape)
        assert np.array_equal(found[f"blk.0.{name}.weight"], expected)
        assert not np.array_equal(expected, dense)


def test_a_table_of_rotary_factors_is_that_of_mlx(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "llama3")
    _write(folder, tmp_path / "model.gguf")
    tensors = {one.name: one.data for one in GGUFReader(tmp_path / "model.gguf").tensors}
    rope = model_folder.load(folder)[0].layers[0].self_attn.rope
    plain = 10_000.0 ** (np.arange(0, 32, 2) / 32)
    assert np.allclose(tensors["rope_freqs.weight"] * plain, np.array(rope._freqs), rtol=1e-5)


def test_another_table_of_rotary_factors_is_refused(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "llama3")
    _change(folder, {"rope_scaling": {**gguf_models.CONFIGS["llama3"]["rope_scaling"], "high_freq_factor": 3.0}})
    _write(folder, tmp_path / "model.gguf")
    with pytest.raises(ArtifactError, match="its rotary embedding has a table of factors that is not Llama 3's"):
        gguf_reading.write_folder(tmp_path / "model.gguf", tmp_path, key="model.gguf")


def test_a_requested_type_encodes_every_matrix_again_within_its_rounding(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "qwen3_moe")
    for kind, most in {"q8_0": 0.01, "q5_0": 0.06, "q5_1": 0.05, "q4_0": 0.12, "q4_1": 0.09, "bf16": 0.003}.items():
        written = _write(folder, tmp_path / "model.gguf", kind)
        types = {one.name: one.type for one in written.tensors}
        assert types["blk.0.ffn_up_exps.weight"] == types["blk.1.attn_v.weight"] == kind
        assert types["output.weight"] == ("bf16" if kind == "bf16" else "q8_0")
        assert types["blk.0.ffn_gate_inp.weight"] == "f32"  # the router decides which experts run
        assert 0 < max(one.relative_error for one in written.tensors) < most
    assert {one.type for one in _write(folder, tmp_path / "model.gguf", "q4_0", "q4_0").tensors} == {"q4_0", "f32"}


def test_the_header_has_what_llama_cpp_needs(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "gemma2")
    _write(folder, tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    expected = {
        "general.architecture": "gemma2",
        "general.name": "small",
        "general.license": "apache-2.0",
        "general.file_type": 1,
        "gemma2.block_count": 2,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 32,
        "gemma2.attn_logit_softcapping": 50.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == gguf_models.VOCAB_SIZE
    end = fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]]
    assert end == "<|im_end|>"
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eot_token_id"]] == "<|endoftext|>"
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


def test_equal_models_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    gguf_models.write_model(folder, "llama")
    for name in ("one.gguf", "two.gguf"):
        _write(folder, tmp_path / name)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_tensor_that_is_not_the_models_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_models.write_model(folder, "llama")
    encode = gguf_blocks.encode
    monkeypatch.setattr(gguf_blocks, "encode", lambda layer, kind, rows: encode(layer, kind, None))  # not permuted
    with pytest.raises(StageError, match=re.escape(f"{KEY}: blk.0.attn_q.weight read back as f16 differs by 1.")):
        _write(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False},
            "its config.json has norm_topk_prob = False, and llama.cpp assumes True for qwen3moe.",
        ),
        (
            "gemma3_text",
            {"sliding_window_pattern": 3},
            "its config.json has sliding_window_pattern = 3, and llama.cpp assumes 6 for gemma3.",
        ),
        (
            "gemma2",
            {"query_pre_attn_scalar": 64},
            "its config.json has query_pre_attn_scalar = 64, and llama.cpp assumes 32 for gemma2.",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            'its config.json has rope_scaling of the type "dynamic", which cannot be written as GGUF.',
        ),
    ],
)
def test_settings_that_llama_cpp_does_not_read_are_refused(
    folder: Path, tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    gguf_models.write_model(folder, name)
    _change(folder, config)
    with pytest.raises(ArtifactError) as caught:
        _write(folder, tmp_path / "model.gguf")
    assert str(caught.value) == f'{KEY}: {message} Export it with format = "mlx".'
    assert not (tmp_path / "model.gguf").exists()


def _change(folder: Path, config: dict[str, Any]) -> None:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
