"""Give a model rows for tokens that its vocabulary lacks: the mean of its rows, or that of its own end token."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.storage import config_json


def grow_vocabulary(
    model: nn.Module, config: Mapping[str, Any], vocab_size: int, *, ends: Iterable[int] = ()
) -> dict[str, Any]:
    """Append rows to the embedding and to an untied output head, and return the `config.json` with their number.

    A new row is the mean of the existing ones: the logits of a new token are those of an average token, and the
    probabilities of all others change little (Hewitt 2021, "Initializing new word embeddings"). A token that ends an
    answer begins as the token that the model ends a text with, if its config has one: a few updates at the learning
    rate of fine-tuning move a row too little for it to become the likeliest.

    Args:
        model: dense; changed in place.
        config: its `config.json`.
        vocab_size: rows to have, V; more than it has.
        ends: ids of tokens that end an answer; the new ones among them are meant.

    Raises:
        ValueError: no layer of the model has a row for each token.
    """
    rows = config_json.vocab_size(config)
    layers = list(_layers_by_token(model, rows))
    if not layers:
        raise ValueError(f"no layer has {rows:,} rows")
    own_ends = sorted(token for token in config_json.end_of_text(config) if 0 <= token < rows)
    copies = {token: own_ends[0] for token in ends if rows <= token < vocab_size} if own_ends else {}
    for layer in layers:
        for name in ("weight", "bias"):
            if name in layer:
                layer[name] = _grown(layer[name], vocab_size, copies)
    return config_json.with_vocab_size(config, vocab_size)


def _layers_by_token(model: nn.Module, rows: int) -> Iterator[nn.Module]:
    """Yield the embedding and an untied head: layers with a row for each token."""
    for path, layer in model.named_modules():
        is_head = isinstance(layer, nn.Linear) and path.rpartition(".")[2] in ("lm_head", "embed_out", "output", "head")
        if (isinstance(layer, nn.Embedding) or is_head) and layer.weight.shape[0] == rows:
            yield layer


def _grown(array: mx.array, rows: int, copies: Mapping[int, int]) -> mx.array:
    """Return an array (V, ...) with more rows, each the mean of the existing ones or the copy of one of them."""
    known = array.shape[0]
    mean = array.astype(mx.float32).mean(axis=0).astype(array.dtype)
    return mx.concatenate(
        [array, mx.stack([array[copies[row]] if row in copies else mean for row in range(known, rows)])]
    )
