"""The texts of a quantization: what a method learns, what judges it, and how much of the second is in the first."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxflow.data.token_file import Rows, TokenFile

#: Tokens of a passage: as many equal ones in a row are no coincidence.
PASSAGE = 32

# Share of the judging tokens from which a figure is worth a warning
_LEAST_SHARE = 0.01

# Odd, for a hash modulo 2^64: every power of it is invertible
_BASE = np.uint64(0x9E3779B97F4A7C15)

# Training rows that are compared at most, evenly spread, and at a time
_MOST_ROWS, _ROWS_AT_ONCE = 1 << 16, 1 << 10


class QuantizationTexts(NamedTuple):
    """The texts of a quantization, for the report.

    Attributes:
        calibration: the text that the method learns; None for a method that learns nothing.
        judging: the rows that measure the quality loss.
        overlap: share of the judging tokens that lie in passages which are among the learned rows, too.
    """

    calibration: str | None
    judging: str
    overlap: float


def describe_texts(learned: NDArray[Any] | None, train: TokenFile, judging: Rows, *, stage: str) -> QuantizationTexts:
    """Return the names of the texts of a quantization, and their overlap.

    Args:
        learned: (R, L' + 1) ids of the rows that the method learns; None for none.
        train: the training rows.
        judging: the rows that measure the quality loss.
        stage: of the tokens.
    """
    judged = f"{judging.num_rows:,} validation rows of {stage}, {judging.tokens.shape[1] - 1:,} tokens each"
    if learned is None:
        return QuantizationTexts(None, judged, 0.0)
    rows = f"{len(learned):,} rows of {learned.shape[1] - 1:,} tokens"
    name = f"{rows}, from {train.rows.num_rows:,} training rows of {stage}"
    return QuantizationTexts(name, judged, overlap(judging, learned))


def overlap(judging: Rows, learned: NDArray[Any]) -> float:
    """Return the share of tokens that lie in a passage of `PASSAGE` tokens which is among the learned rows, too.

    Padding is no token, and no part of a passage.

    Args:
        judging: rows of the token file.
        learned: (R, L + 1) ids; of more than 65,536 rows as many are compared, evenly spread.
    """
    is_text = np.asarray(judging.marks) != 0
    passages = _hashes(np.asarray(judging.tokens))
    wanted = np.unique(passages)
    known = np.zeros(len(wanted), bool)
    chosen = learned[:: -(-len(learned) // _MOST_ROWS)] if len(learned) else learned
    for begin in range(0, len(chosen), _ROWS_AT_ONCE):
        known |= np.isin(wanted, _hashes(chosen[begin : begin + _ROWS_AT_ONCE]))
    is_known = known[np.searchsorted(wanted, passages)] if len(wanted) else np.zeros(passages.shape, bool)
    for place in range(PASSAGE):
        is_known &= is_text[:, place : place + is_known.shape[1]]
    covered = np.zeros(is_text.shape, bool)
    for place in range(PASSAGE):
        covered[:, place : place + is_known.shape[1]] |= is_known
    return float(covered.sum() / max(1, is_text.sum()))


def _hashes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a hash of every passage within the rows, (R, L + 2 - PASSAGE); none if they are shorter."""
    count = max(0, rows.shape[1] - PASSAGE + 1)
    hashes = np.zeros((len(rows), count), np.uint64)
    for place in range(PASSAGE if count else 0):
        hashes *= _BASE
        hashes += rows[:, place : place + count].astype(np.uint64) + np.uint64(1)
    return hashes


def text_warnings(texts: QuantizationTexts, *, task: str, perplexity_increase: float, learns_text: bool) -> list[str]:
    """Return warnings about figures that flatter a method.

    Args:
        texts: of the quantization.
        task: for the messages.
        perplexity_increase: of the quantized model over the dense one.
        learns_text: whether the method trains on the text itself, and not on the dense model's outputs.
    """
    warnings = []
    if texts.overlap >= _LEAST_SHARE:
        warnings.append(
            f"{task}: {texts.overlap:.1%} of the judging tokens are in the text that the method learned: the figures "
            "flatter it. Set validation_sources of another text in [pretokenize]."
        )
    if learns_text and perplexity_increase < 0:
        warnings.append(
            f"{task}: the perplexity is lower than the dense model's, since the method learned this kind of text. "
            "Judge by the divergence (kl), or set distill = true."
        )
    return warnings
