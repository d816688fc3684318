"""Compares what a method learned with rounding to nearest, which learns nothing."""

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.perplexity import mean_and_error
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_divergence import StoredDivergence

#: Rows on which both are measured.
CHECKED_ROWS = 16

# Standard errors by which a learned model must be worse before it is worth a warning
_ERRORS = 2.0


class RoundingCheck(NamedTuple):
    """A learned and a rounded model compared on the same tokens, in nats a token.

    Attributes:
        learned: what the learned model loses.
        rounded: what rounding loses.
        error: standard error of their difference.
    """

    learned: float
    rounded: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether the learned model loses more than rounding, beyond chance."""
        return self.learned - self.rounded > _ERRORS * self.error


def check_rounding(
    dense: Callable[[], nn.Module],
    learned: Callable[[], nn.Module],
    layers: Mapping[str, Setting],
    rows: Rows,
    *,
    folder: Path,
    by_text: bool,
) -> RoundingCheck:
    """Return what a learned model loses on some rows, and what the same plan loses by rounding.

    Args:
        dense: returns the dense model in eval mode, with lazy weights of its own.
        learned: returns the quantized model in the same way.
        layers: the plan, module path to setting.
        rows: the first `CHECKED_ROWS` are used.
        folder: for codes and hidden states.
        by_text: compare the losses on the text, for a method that learns it; else the divergences from the dense model.
    """
    measured = StoredDivergence(dense, rows.head(CHECKED_ROWS), folder)
    stored = measured.store(rounded_codes(dense(), layers))
    column = 1 if by_text else 2
    rounded = measured.columns_of_codes(dense, layers, stored)[column]
    own = measured.columns(learned)[column]
    return RoundingCheck(float(own.mean()), float(rounded.mean()), mean_and_error(own - rounded)[1])


def rounded_codes(
    model: nn.Module,
    layers: Mapping[str, Setting],
    *,
    known: Container[str] = (),
    packing: Callable[[mx.array, Setting], Packed] = pack,
) -> Iterator[tuple[str, Packed]]:
    """Yield the codes of layers by rounding, one at a time; the model loses their weights.

    Args:
        model: dense.
        layers: module path to setting.
        known: paths that are left out.
        packing: rounds a weight.
    """
    dense = quantizable_layers(model)
    for path, setting in layers.items():
        if path not in known:
            yield path, packing(dense.pop(path).pop("weight"), setting)
