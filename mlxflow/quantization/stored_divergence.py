"""Divergence of quantized models from a dense one, with codes and the dense model's hidden states in files.

Several quantized models are compared with one dense model: memory holds a block of each, and heads and embeddings.
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.dense_reference import Reference, cached_reference
from mlxflow.evaluation.kl_divergence import compare_positions
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.models.fp32_on_cpu import loading_in_fp32_on_cpu
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.layer_inputs import with_codes
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_codes import CodesOnDisk

# Rows in a forward pass
_BATCH_SIZE = 8


class StoredDivergence:
    """Divergences from a dense model on some rows.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own.
        rows: to measure on.
        folder: for the dense model's hidden states, which are computed once, and for codes.
    """

    def __init__(self, load: Callable[[], nn.Module], rows: Rows, folder: Path) -> None:
        self._rows, self._folder, self._count = rows, folder, 0
        self._reference: Reference = cached_reference(
            loading_in_fp32_on_cpu(load),
            rows,
            folder=folder,
            key="dense",
            batch_size=_BATCH_SIZE,
            masks_documents=False,
        )

    def store(self, codes: Iterable[tuple[str, Packed]]) -> CodesOnDisk:
        """Write the codes of a plan, see `CodesOnDisk.gather`, and return where they lie."""
        stored = CodesOnDisk(self._folder / f"codes-{self._count}")
        self._count += 1
        stored.gather(codes)
        return stored

    def of(self, load: Callable[[], nn.Module], plan: Mapping[str, Setting], stored: CodesOnDisk) -> float:
        """Return the divergence of a model with stored codes from the dense one, in nats per token.

        Args:
            load: returns the model whose layers get the codes, with lazy weights of its own.
            plan: module path to setting.
            stored: codes of these layers.
        """
        mean = self.columns_of_codes(load, plan, stored)[2].mean()
        return float(np.maximum(0.0, mean))  # rounding may give less; a NaN stays one

    def columns_of_codes(
        self, load: Callable[[], nn.Module], plan: Mapping[str, Setting], stored: CodesOnDisk
    ) -> NDArray[np.float64]:
        """Return what the model of `of` and the dense one give at each target; see `compare_positions`."""
        return self.columns(with_codes(load, plan, stored.unread))

    def columns(self, load: Callable[[], nn.Module]) -> NDArray[np.float64]:
        """Return what a model and the dense one give at each target; see `compare_positions`.

        Args:
            load: returns the model in eval mode, with lazy weights of its own.
        """
        model = StreamedModel(loading_in_fp32_on_cpu(load))
        found = compare_positions(self._reference, model, self._rows, batch_size=_BATCH_SIZE, masks_documents=False)
        del model
        gc.collect()  # embedding and head in reference cycles, before the next model has its own
        return found
