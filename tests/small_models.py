"""Models small enough to be trained in a moment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from tokenizers import Tokenizer

from mlxflow.benchmarking.time_budget import Budget
from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.models import model_folder
from mlxflow.models.new_model import ModelConfig, llama_config

#: Time without end.
FREE = Budget(0.0, task="test")


def llama(*, seed: int = 0, **shape: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a Llama with two layers, unless the shape says otherwise, and its config."""
    usual: dict[str, Any] = {"vocab_size": 50, "context_length": 8, "num_kv_heads": 1}
    usual |= {"hidden_size": 16, "intermediate_size": 16} | shape
    sizes = {name: usual.pop(name) for name in [*usual] if name in ModelConfig.__struct_fields__}
    config = llama_config(ModelConfig(**sizes), **usual)
    return model_folder.build(config, seed=seed), config


def write_llama(
    folder: Path, texts: Sequence[str], *, special: Sequence[str], template: str | None, context_length: int
) -> None:
    """Write the folder of a small Llama with a tokenizer trained on some texts.

    Args:
        folder: is there already.
        texts: for the tokenizer.
        special: its control tokens.
        template: of conversations; None for none.
        context_length: of the model.
    """
    tokenizer = train_tokenizer(texts, vocab_size=300, special_tokens=special)
    vocabulary = trained_vocabulary(tokenizer.to_str(), context_length=context_length, template=template)
    save_vocabulary(vocabulary, tokenizer_file=folder / "tokenizer.json", config_file=folder / "tokenizer_config.json")
    model, config = llama(vocab_size=vocabulary.size, context_length=context_length, hidden_size=32, seed=3)
    save_model(model, config, folder)


def add_token_without_row(folder: Path, text: str) -> int:
    """Add a token to the tokenizer of a model folder and return its id, for which the embedding has no row."""
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    number = int(tokenizer.get_vocab_size())
    tokenizer.add_tokens([text])
    file.write_text(tokenizer.to_str())
    return number


def save_model(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write a model with its configuration into a folder."""
    model_folder.save(
        model=model,
        config=config,
        config_file=folder / "config.json",
        model_file=folder / "model.safetensors",
        provenance={},
    )
