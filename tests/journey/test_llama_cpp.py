"""llama.cpp opens what the export stage writes, and computes what mlx computes: every architecture, type and tokenizer.

Needs `llama-cpp-python`, which compiles for a long time; skipped without it. Run `pytest -m journey -n 0`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import real_models
from mlxflow.models import gguf_reading, gguf_writing, model_folder
from mlxflow.models.gguf_writing import GgufRequest
from tests.conftest import mlxflow
from tests.journey import pretrained
from tests.models import gguf_models

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

pytestmark = pytest.mark.journey

IDS = [(7 * place + place * place) % 290 for place in range(48)]


def _logits(file: Path) -> "np.ndarray[Any, Any]":
    """Return llama.cpp's logits, (L, V), of some ids."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # fp16 by default
    model = llama_cpp.Llama(str(file), n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_threads=1, **exact)
    model.eval(IDS)
    return np.array(model.scores[: len(IDS)])


def _ours(folder: Path) -> "np.ndarray[Any, Any]":
    model = model_folder.load(folder)[0]
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([IDS]))[0])


def _difference(found: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_llama_cpp_computes_the_logits_of_every_architecture(tmp_path: Path, name: str) -> None:
    gguf_models.write_model(tmp_path, name)
    gguf_writing.write(tmp_path, tmp_path / "model.gguf", GgufRequest("f32", "auto", "small", "", "model"))
    # llama.cpp looks up Gemma's activation in a table of fp16, which rounds by 2^-11 in each of six layers
    assert _difference(_logits(tmp_path / "model.gguf"), _ours(tmp_path)) < (5e-3 if "gemma" in name else 5e-6)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"])
def test_llama_cpp_reads_every_type(tmp_path: Path, kind: str) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    gguf_models.write_model(tmp_path, "llama", config=wide)
    gguf_writing.write(tmp_path, tmp_path / "model.gguf", GgufRequest(kind, "auto", "small", "", "model"))
    back = tmp_path / "back"
    back.mkdir()
    gguf_reading.write_folder(tmp_path / "model.gguf", back, key="model.gguf")
    # llama.cpp rounds the activations to eight bits beside quantized weights
    assert _difference(_logits(tmp_path / "model.gguf"), _ours(back)) < 0.05
    assert _difference(_ours(back), _ours(tmp_path)) < 0.5


@pytest.mark.parametrize(
    "setting",
    [{"bits": 4}, {"bits": 3, "group_size": 64}, {"bits": 5}, {"bits": 8}, {"mode": "mxfp4"}, {"mode": "nvfp4"}],
    ids=str,
)
def test_llama_cpp_computes_with_the_codes_of_mlx(tmp_path: Path, setting: dict[str, Any]) -> None:
    dense, quantized = tmp_path / "dense", tmp_path / "quantized"
    dense.mkdir()
    quantized.mkdir()
    gguf_models.write_model(dense, "qwen3", dtype=mx.float16)
    gguf_models.quantize(dense, quantized, **({"group_size": 16} if setting.get("mode") == "nvfp4" else {}) | setting)
    gguf_writing.write(quantized, tmp_path / "model.gguf", GgufRequest("auto", "auto", "small", "", "model"))
    difference = _difference(_logits(tmp_path / "model.gguf"), _ours(quantized))
    assert difference < 0.05
    assert difference < 0.5 * _difference(_ours(quantized), _ours(dense)) or setting == {"bits": 8}


def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path: Path) -> None:
    from tests.models import test_gguf_tokenizer as tokenizers

    for number, (rule, make) in enumerate(tokenizers.BYTE_LEVEL.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = make()
        config = {"vocab_size": own.get_vocab_size(), "eos_token_id": 0}
        gguf_models.write_model(folder, "llama", config=config)
        tokenizers.write(folder, own, eos_token="<|end|>")
        _require_equal_ids(folder, own, rule)


def test_llama_cpp_splits_texts_as_a_tokenizer_with_byte_fallback_does(tmp_path: Path) -> None:
    from tests.models import test_gguf_tokenizer as tokenizers

    own = tokenizers.with_fallback()
    gguf_models.write_model(tmp_path, "llama", config={"vocab_size": own.get_vocab_size(), "eos_token_id": 2})
    tokenizers.write(tmp_path, own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    _require_equal_ids(tmp_path, own, "llama")


def _require_equal_ids(folder: Path, own: Any, rule: str) -> None:
    file = folder / "model.gguf"
    gguf_writing.write(folder, file, GgufRequest("f16", "auto", "small", "", "model"))
    model = llama_cpp.Llama(str(file), n_ctx=64, vocab_only=True, verbose=False)
    texts = (
        "a small text of words",
        "numbers 1234567 and\n\n  lines\r\n",
        "été naïve ½ 日本 🚀",
        "x = {'key': [1, 2]}",
    )
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=False, special=False)
        assert found == own.encode(text, add_special_tokens=False).ids, (rule, text)


# --- a real model

PROSE = (
    "The city lies on both banks of the river, and its oldest bridge was built of stone in the twelfth century. In "
    "spring the water rises when the snow of the mountains melts, and the lower streets are closed for some days. "
    "Most people who live there work in the harbour, in the two paper mills, or at the university, which was founded "
    "by a merchant who had no children. He left his house, his ships and a library of nine hundred books to the town, "
    "under the condition that anyone who could read should be allowed to enter it without paying."
)
QUESTION = "What is the capital of France?"

EXPORTS = """
[[quantize]]
name = "q4"
model = "base"
group_size = 32
dtype = "fp16"

[[quantize]]
name = "s8"
model = "base"
mode = "symmetric"
bits = 8
dtype = "fp16"

[[export]]
name = "dense"
model = "base"

[[export]]
name = "q4"
model = "quantize:q4"

[[export]]
name = "s8"
model = "quantize:s8"
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which SmolLM2 was quantized and exported."""
    try:
        base = pretrained.model_folder()
    except pretrained.UnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("exported")
    (folder / "base").symlink_to(base)
    (folder / "workflow.toml").write_text(EXPORTS)
    done = mlxflow(folder, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


SOURCES = {"dense": "base", "q4": "artifacts/quantize/q4", "s8": "artifacts/quantize/s8"}


@pytest.mark.parametrize("variant", SOURCES)
def test_a_real_model_says_the_same_in_llama_cpp(exported: Path, variant: str) -> None:
    from mlx_lm import load, stream_generate

    file = exported / "artifacts" / "export" / variant / "model.gguf"
    theirs = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    model, tokenizer, *_ = load(str(exported / SOURCES[variant]))
    ids = tokenizer.encode(PROSE)
    assert theirs.tokenize(PROSE.encode(), add_bos=False) == ids
    theirs.eval(ids)
    found = _perplexity(np.array(theirs.scores[: len(ids)]), ids)
    expected = _perplexity(np.array(model(mx.array([ids]))[0].astype(mx.float32)), ids)
    # llama.cpp rounds activations beside quantized weights to eight bits
    assert found == pytest.approx(expected, rel=5e-3 if variant == "dense" else 0.02)
    messages = [{"role": "user", "content": QUESTION}]
    theirs.reset()
    answer = theirs.create_chat_completion(messages, temperature=0.0, max_tokens=24)["choices"][0]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    own = "".join(one.text for one in stream_generate(model, tokenizer, prompt, max_tokens=24))
    assert answer["message"]["content"].strip() == own.strip()
    assert "Paris" in own
    assert answer["finish_reason"] == "stop"  # the end of a turn is in the file


def test_a_file_of_k_quants_reads_as_in_llama_cpp() -> None:
    from mlx_lm import load

    try:
        file = real_models.gemma3_file()
    except pretrained.UnavailableError as error:
        pytest.skip(str(error))
    theirs = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    model, tokenizer, *_ = load(str(gguf_reading.opened(file)))
    ids = tokenizer.encode(PROSE)
    assert theirs.tokenize(PROSE.encode()) == ids
    theirs.eval(ids)
    found = _perplexity(np.array(theirs.scores[: len(ids)]), ids)
    expected = _perplexity(np.array(model(mx.array([ids]))[0].astype(mx.float32)), ids)
    # llama.cpp rounds activations beside quantized weights to eight bits, and the folder is in bf16
    assert found == pytest.approx(expected, rel=0.03)


def _perplexity(logits: "np.ndarray[Any, Any]", ids: list[int]) -> float:
    shifted = logits[:-1].astype(np.float64)
    largest = shifted.max(-1, keepdims=True)
    normalizer = largest[:, 0] + np.log(np.exp(shifted - largest).sum(-1))
    return float(np.exp(np.mean(normalizer - shifted[np.arange(len(ids) - 1), ids[1:]])))


@pytest.mark.parametrize("variant", SOURCES)
def test_a_modelfile_asks_as_the_chat_template_does(exported: Path, variant: str) -> None:
    lines = (exported / "artifacts" / "export" / variant / "Modelfile").read_text()
    assert "FROM ./model.gguf\n" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert '{{ if eq .Role "user" }}' in lines.replace("else if", "if")
    assert "You are a helpful AI assistant named SmolLM" in lines.partition("{{ end }}")[0]
