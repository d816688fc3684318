"""What the rows of `benchmarks/finetune.py` train: a model folder and rows of tokens, made here.

The tokenizer has a word for each id, so that a text of words is a row of known tokens for mlx-lm's command, too.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.shapes import LLAMA_1B, LLAMA_8B, TINY_LLAMA

_IS_TINY = bool(os.environ.get("TINY"))
_UNKNOWN, _END = "<unknown>", "<end>"  # ids 0 and 1; no word contains them


class Job(NamedTuple):
    """What is trained.

    Attributes:
        shape: of the model, its `config.json`; empty for a pretrained model.
        batch: rows a step.
        length: tokens of a row.
        bits: of the weights; 0 for dense ones in bf16.
        method: "lora", "dora" or "full".
        steps: timed, after `warm` others.
        warm: steps that are not timed.
        learning_rate: constant.
        precision: of our rows, as `[train]` has it; mlx-lm computes in the folder's bf16.
        text_length: tokens of a row that are text, before padding; 0 for all.
    """

    shape: dict[str, Any]
    batch: int
    length: int
    bits: int = 4
    method: str = "lora"
    steps: int = 8
    warm: int = 2
    learning_rate: float = 1e-5
    precision: Literal["fp32", "bf16", "bf16-pure"] = "bf16"
    text_length: int = 0

    @property
    def width(self) -> int:
        """Tokens of a row without padding."""
        return self.text_length or self.length

    @property
    def tokens(self) -> int:
        """Tokens a step, without padding."""
        return self.batch * self.width


_LARGE = TINY_LLAMA if _IS_TINY else LLAMA_8B
_LENGTH = 32 if _IS_TINY else 2048
_DENSE = TINY_LLAMA if _IS_TINY else LLAMA_1B | {"vocab_size": 128_256}

#: The jobs by their names on the command line.
JOBS = {
    "8b": Job(_LARGE, 4, _LENGTH),
    "8b-8k": Job(_LARGE, 1, 4 * _LENGTH, steps=6),
    "8b-32k": Job(_LARGE, 1, 16 * _LENGTH, steps=3, warm=1),
    "8b-dora": Job(_LARGE, 4, _LENGTH, method="dora", steps=5),
    "1gb": Job(_LARGE | {"num_hidden_layers": 2 if _IS_TINY else 4}, 1, 8 if _IS_TINY else 64, steps=1, warm=0),
    "1b-full": Job(_DENSE, 4, _LENGTH, bits=0, method="full", precision="bf16-pure"),
    "cpu": Job({}, 2, 8 if _IS_TINY else 64, steps=2, warm=1, precision="fp32"),
    "cpu-padded": Job({}, 2, 96 if _IS_TINY else 256, steps=2, warm=1, precision="fp32", text_length=31),
    "8b-padded": Job(_LARGE, 4, _LENGTH, text_length=_LENGTH // 4),
}


def make(name: str, folder: Path) -> None:
    """Write the model folder of a job and the texts that mlx-lm's command reads, if they are not there.

    Args:
        name: of the job.
        folder: gets `model` and `data`.
    """
    job = JOBS[name]
    if not (folder / "model" / "model.safetensors").exists():
        (folder / "model").mkdir(parents=True, exist_ok=True)
        if job.shape:
            _write_random_model(job, folder / "model")
        else:
            _quantize_pretrained(job, folder / "model")
    (folder / "data").mkdir(exist_ok=True)
    texts = [_text(row) for row in token_rows(job, folder)[:, :-1]]
    for file, chosen in (("train", texts), ("valid", [text[: len(text) // 8] for text in texts])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (folder / "data" / f"{file}.jsonl").write_text(lines)


def token_rows(job: Job, folder: Path) -> Any:
    """Return the rows of every step without padding, (B, width + 1): random words and the end of a text."""
    vocab_size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    rows = np.random.default_rng(0).integers(2, vocab_size, size=(job.batch, job.width + 1))
    rows[:, -1] = 1
    return rows.astype(np.int32)


def padded_rows(job: Job, folder: Path) -> Any:
    """Return tokens and marks of `token_rows` as the token file has them, (B, L + 1)."""
    rows = token_rows(job, folder)
    room = ((0, 0), (0, job.length + 1 - rows.shape[1]))
    return np.pad(rows, room), np.pad(np.full(rows.shape, 3, np.uint8), room)


def _text(row: Any) -> str:
    return " ".join(f"w{number}" for number in row)


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    vocabulary = {_UNKNOWN: 0, _END: 1} | {f"w{number}": number for number in range(2, vocab_size)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "unk_token": _UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def write_random_folder(shape: dict[str, Any], folder: Path) -> None:
    """Write a model folder with random bf16 weights, and a tokenizer that has a word for each id.

    Args:
        shape: its `config.json`.
        folder: exists.
    """
    _write_random_model(Job(shape, 1, 1, bits=0), folder)


def _write_random_model(job: Job, folder: Path) -> None:
    """Write random weights tensor by tensor: codes are random bits, scales give the spread of fresh weights."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from mlxflow.models import model_folder

    mx.random.seed(0)
    model = model_folder.skeleton(job.shape)
    quantization = {"group_size": 64, "bits": job.bits}
    if job.bits:
        nn.quantize(model, **quantization)
    weights = {name: _random(mx, name, value, job.bits) for name, value in tree_flatten(model.parameters())}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = job.shape | {"eos_token_id": 1, "torch_dtype": "bfloat16"}
    if job.bits:
        config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(job.shape["vocab_size"], folder)


def random_codes(mx: Any, shape: tuple[int, ...]) -> Any:
    """Return random bits as packed codes."""
    low, high = (mx.random.randint(0, 1 << 16, shape).astype(mx.uint32) for _ in range(2))
    return (high << 16) | low


def _random(mx: Any, name: str, value: Any, bits: int) -> Any:
    """Return a parameter's random value; the model's own, which is lazy, gives its shape."""
    step = 0.02 / (2**bits / 12**0.5) if bits else 0.0  # of uniform codes with a deviation of 0.02
    if value.dtype == mx.uint32:
        return random_codes(mx, value.shape)
    if name.endswith("norm.weight"):
        return mx.ones(value.shape, mx.bfloat16)
    if name.endswith("scales"):
        return (mx.random.uniform(0.8, 1.2, value.shape) * step).astype(mx.bfloat16)
    if name.endswith("biases"):
        return mx.full(value.shape, -step * (2**bits - 1) / 2, mx.bfloat16)
    return (mx.random.normal(value.shape) * 0.02).astype(mx.bfloat16)


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct: `SMOLLM2`, or the one that the journey's tests use.

    Raises:
        SystemExit: it is missing.
    """
    from tests.journey import pretrained

    try:
        return Path(os.environ["SMOLLM2"]) if "SMOLLM2" in os.environ else pretrained.model_folder()
    except pretrained.UnavailableError as error:
        raise SystemExit(f"SmolLM2-135M-Instruct: {error}. Set SMOLLM2 to its folder.") from error


def _quantize_pretrained(job: Job, folder: Path) -> None:
    """Write SmolLM2-135M-Instruct in 4 bits, from the folder that the journey's tests made, with the words as tokens.

    Raises:
        SystemExit: that model is missing.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from mlxflow.models import model_folder

    source = smollm2_folder()
    model, config = model_folder.load(source)
    nn.quantize(model, group_size=64, bits=job.bits)
    mx.eval(model.parameters())
    model_folder.save(
        model=model,
        config=config | {"quantization": {"group_size": 64, "bits": job.bits}, "eos_token_id": 1},
        config_file=folder / "config.json",
        model_file=folder / "model.safetensors",
        provenance={},
    )
    _write_tokenizer(config["vocab_size"], folder)
