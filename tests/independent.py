"""Figures computed a second time, by other means than mlxflow's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflow.data.token_file import TokenFile

#: How far two computations of one mean loss, in nats, may differ for rounding alone, by the dtype of the weights. A
#: logit of the tiny models is below 8, one rounding of it is at most 8 * 2^-24 in fp32 and 8 * 2^-9 in bf16. Some
#: thirty follow one another: thirty times that for fp32; for bf16, where the mean over more than 200 tokens takes most
#: of it away again (sqrt(30 / 200) is left of it), once that.
LOSS_TOLERANCE = {"fp32": 30 * 8 * 2**-24, "bf16": 8 * 2**-9}


def validation_loss(logits: Callable[[mx.array], mx.array], file: Path, max_rows: int) -> float:
    """Return the mean loss in nats per learned token, row by row, in float64 from a model's own logits.

    Args:
        logits: maps (1, L) token ids to (1, L, V).
        file: a token file.
        max_rows: its first so many rows are taken.
    """
    rows = TokenFile.open(file).rows
    total, count = 0.0, 0
    for tokens, marks in zip(rows.tokens[:max_rows], rows.marks[:max_rows], strict=True):
        used = int(np.count_nonzero(marks))
        ids = mx.array(np.asarray(tokens[:used], np.int32))[None]
        found = np.array(logits(ids[:, :-1])[0].astype(mx.float32), np.float64)
        peak = found.max(axis=-1)
        log_sums = np.log(np.exp(found - peak[:, None]).sum(axis=-1)) + peak
        picked = np.take_along_axis(found, np.array(ids)[0, 1:, None], axis=-1)[:, 0]
        learned = (np.asarray(marks[1:used]) & 1).astype(bool)
        total += float((log_sums - picked)[learned].sum())
        count += int(learned.sum())
    return total / count


def open_with_mlx_lm(folder: Path) -> tuple[Any, Any]:
    """Return the model and tokenizer of a folder as mlx-lm opens them, with the adapters that lie in it."""
    from mlx_lm import load

    adapters = str(folder) if (folder / "adapter_config.json").is_file() else None
    model, tokenizer, *_ = load(str(folder), adapter_path=adapters)
    return model, tokenizer
