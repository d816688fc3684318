"""What evaluating costs: memory and time of whole logits against slices, and of a dense side that is kept.

    python benchmarks/evaluation.py [--rows 8] [--hidden-size 128] [--num-layers 4]

A Llama with the vocabulary and context of a small real model and weights by chance: memory and time depend on neither
what the weights are nor what the tokens say.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # after the BLAS library
import mlx.nn as nn
import numpy as np

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.dense_reference import cached_reference
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.models import model_folder
from mlxflow.models.new_model import ModelConfig, llama_config

VOCAB_SIZE, CONTEXT_LENGTH, NUM_VARIANTS = 49_152, 512, 3


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parsed = parser.parse_args()
    dense, *variants = (_model(seed, parsed) for seed in range(1 + NUM_VARIANTS))
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB_SIZE, (parsed.rows, CONTEXT_LENGTH + 1)).astype(np.uint16)
    rows = Rows(tokens, np.full(tokens.shape, 3, np.uint8))
    _measure("perplexity, whole logits", lambda: _whole(dense, rows))
    _measure("perplexity, slices", lambda: measure_perplexity(dense, rows, batch_size=32).loss)

    def each(reference: Any) -> list[float]:
        return [measure_divergence(reference(), one, rows, batch_size=32, masks_documents=False).kl for one in variants]

    _measure(f"{NUM_VARIANTS} variants, dense side each time", lambda: each(lambda: dense))
    with tempfile.TemporaryDirectory() as folder:

        def kept() -> Any:
            return cached_reference(
                lambda: dense, rows, folder=Path(folder), key="dense", batch_size=32, masks_documents=False
            )

        _measure(f"{NUM_VARIANTS} variants, dense side kept", lambda: each(kept))
        print(f"kept: {sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6:.1f} MB")


def _model(seed: int, parsed: argparse.Namespace) -> nn.Module:
    config = llama_config(
        ModelConfig(
            hidden_size=parsed.hidden_size,
            num_layers=parsed.num_layers,
            num_heads=parsed.hidden_size // 32,
            num_kv_heads=parsed.hidden_size // 32,
            intermediate_size=3 * parsed.hidden_size,
            rope_theta=1e5,
        ),
        vocab_size=VOCAB_SIZE,
        context_length=CONTEXT_LENGTH,
    )
    return model_folder.build(config, seed=seed)


def _whole(model: nn.Module, rows: Rows) -> float:
    """Return the loss from the logits of all rows at once."""
    model.eval()
    tokens = mx.array(rows.tokens)
    return float(nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:]).mean())


def _measure(name: str, compute: Callable[[], object]) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    found = compute()
    seconds = time.perf_counter() - begin
    print(f"{name}: {seconds:.2f} s, {(mx.get_peak_memory() - before) / 1e6:,.0f} MB beside the weights ({found})")


if __name__ == "__main__":
    main()
