"""Models small enough to be trained in a moment."""

from typing import Any

import mlx.nn as nn

from mlxflow.benchmarking.time_budget import Budget
from mlxflow.models import model_folder

#: Time without end.
FREE = Budget(0.0, task="test")


def llama(*, seed: int = 0, **shape: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a Llama with two layers, unless the shape says otherwise, and its config."""
    usual: dict[str, Any] = {
        "vocab_size": 50,
        "context_length": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 16,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
        "end_of_text": 0,
    }
    config = model_folder.llama_config(**(usual | shape))
    return model_folder.build(config, seed=seed), config
