"""PEFT and llama.cpp open exported adapters, and compute what mlx computes with them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.models import adapter_export, gguf_writing, model_folder
from mlxflow.models.gguf_writing import GgufRequest
from tests.models.test_adapter_export import write_adapted

pytestmark = pytest.mark.journey

IDS = [(7 * place + place * place) % 290 for place in range(48)]


def _ours(folder: Path) -> "np.ndarray[Any, Any]":
    return np.array(model_folder.load(folder)[0](mx.array([IDS]))[0])


def _base_of(adapted: Path, base: Path) -> Path:
    """Return a folder with the model alone."""
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((adapted / name).read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"head_dim": config.get("head_dim")}))
    return base


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_peft_computes_the_logits_of_mlx(tmp_path: Path, name: str, method: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted, exported = tmp_path / "adapted", tmp_path / "exported"
    adapted.mkdir()
    exported.mkdir()
    write_adapted(adapted, name, method)
    base = _base_of(adapted, tmp_path / "base")
    files = {"weights_file": exported / "adapter_model.safetensors", "config_file": exported / "adapter_config.json"}
    adapter_export.write_peft(adapter_export.read(adapted, "model"), base=str(base), **files)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0].numpy()
        found = PeftModel.from_pretrained(model, str(exported))(torch.tensor([IDS])).logits[0].numpy()
    expected = _ours(adapted)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_llama_cpp_computes_the_logits_of_mlx_with_an_adapter(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    write_adapted(adapted, name, "lora")
    base = _base_of(adapted, tmp_path / "base")
    gguf_writing.write(base, tmp_path / "base.gguf", GgufRequest("f32", "auto", "small", "", "model"))
    adapter_export.write_gguf(adapter_export.read(adapted, "model"), adapted, tmp_path / "adapter.gguf", key="model")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "verbose": False, "n_ctx": 64}
    model = llama_cpp.Llama(
        str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "adapter.gguf"), logits_all=True, **exact
    )
    model.eval(IDS)
    found, expected = np.array(model.scores[: len(IDS)]), _ours(adapted)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
