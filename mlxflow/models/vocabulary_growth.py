"""Give a model rows for tokens that its vocabulary lacks: embedding and output head grow by the mean of their rows."""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.storage import config_json


def grow_vocabulary(model: nn.Module, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Append rows to the embedding and to an untied output head, and return the `config.json` with their number.

    A new row is the mean of the existing ones: the logits of a new token are those of an average token, and the
    probabilities of all others change little (Hewitt 2021, "Initializing new word embeddings").

    Args:
        model: dense; changed in place.
        config: its `config.json`.
        vocab_size: rows to have, V; more than it has.

    Raises:
        ValueError: no layer of the model has a row for each token.
    """
    rows = config_json.vocab_size(config)
    layers = list(_layers_by_token(model, rows))
    if not layers:
        raise ValueError(f"no layer has {rows:,} rows")
    for layer in layers:
        for name in ("weight", "bias"):
            if name in layer:
                layer[name] = _grown(layer[name], vocab_size)
    return config_json.with_vocab_size(config, vocab_size)


def _layers_by_token(model: nn.Module, rows: int) -> Iterator[nn.Module]:
    """Yield the embedding and an untied head: layers with a row for each token."""
    for path, layer in model.named_modules():
        is_head = isinstance(layer, nn.Linear) and path.rpartition(".")[2] in ("lm_head", "embed_out", "output", "head")
        if (isinstance(layer, nn.Embedding) or is_head) and layer.weight.shape[0] == rows:
            yield layer


def _grown(array: mx.array, rows: int) -> mx.array:
    """Return an array (V, ...) with more rows, each the mean of the existing ones."""
    mean = array.astype(mx.float32).mean(axis=0, keepdims=True).astype(array.dtype)
    return mx.concatenate([array, mx.repeat(mean, rows - array.shape[0], axis=0)])
