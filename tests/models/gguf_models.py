"""Small models of every architecture that GGUF has a name for, with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlxflow.data.chatml import CHATML
from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.models import model_folder
from mlxflow.storage import config_json

VOCAB_SIZE = 320  # more than the tokenizer has: the last rows have no token

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
_GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "llama3": {
        **_SHAPE,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "biased": {**_SHAPE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**_SHAPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": {**_SHAPE, "head_dim": 16},
    "qwen3": _SHAPE,
    "qwen3_moe": {
        **_SHAPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma2": {**_SHAPE, **_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**_SHAPE, **_GEMMA, "num_hidden_layers": 6, "sliding_window": 32, "sliding_window_pattern": 6},
    "phi3": {**_SHAPE, "head_dim": 16},
    "olmo2": {**_SHAPE, "head_dim": 16},
}

TEXTS = ["a small text of words, numbers 1234 and\nlines\n" * 3, "été déjà vu: naïve café", "x = {'key': [1, 2]}"]


def write_model(folder: Path, name: str, *, dtype: mx.Dtype = mx.float32, config: dict[str, Any] | None = None) -> None:
    """Write a model folder with random weights, those of norms included.

    Args:
        folder: is there already.
        name: of `CONFIGS`.
        dtype: of the weights.
        config: changes of it.
    """
    table = {"model_type": name} | CONFIGS[name] | (config or {})
    model = model_folder.build(table, seed=1)
    model.update(tree_map_with_path(_spread, model.parameters()))
    model.set_dtype(dtype)
    save(folder, model, config_json.with_dtype({**table, "torch_dtype": ""}, str(dtype).rpartition(".")[2]))
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"])
    vocabulary = trained_vocabulary(tokenizer.to_str(), context_length=128, template=CHATML)
    save_vocabulary(vocabulary, tokenizer_file=folder / "tokenizer.json", config_file=folder / "tokenizer_config.json")


def _spread(path: str, value: mx.array) -> mx.array:
    """Return random numbers instead of the ones and zeros of norms and biases, so that a lost one shows."""
    if value.ndim > 1:
        return value
    return value + 0.3 * mx.random.normal(value.shape, key=mx.random.key(len(path) + value.size))


def save(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write weights and config.json of a model folder."""
    files = {"config_file": folder / "config.json", "model_file": folder / "model.safetensors"}
    model_folder.save(model=model, config=config, provenance={}, **files)


def quantize(folder: Path, into: Path, **setting: Any) -> None:
    """Write the quantized model of a folder, as mlx-lm does it."""
    from mlx_lm.utils import quantize_model

    model, config = model_folder.load(folder)
    model, config = quantize_model(model, config, **{"group_size": 32, "bits": 4} | setting)
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    save(into, model, config)


def logits(folder: Path) -> mx.array:
    """Return the logits, (L, V), of a text by the model of a folder, in fp32."""
    model = model_folder.load(folder)[0]
    model.set_dtype(mx.float32)
    ids = [(7 * place + place * place) % 290 for place in range(48)]
    result: mx.array = model(mx.array([ids]))[0]
    return result


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """Return the `tokenizer.json` of a folder."""
    definition: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return definition
