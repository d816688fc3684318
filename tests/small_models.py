"""Models small enough to be trained in a moment."""

from typing import Any

import mlx.nn as nn

from mlxflow.benchmarking.time_budget import Budget
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
