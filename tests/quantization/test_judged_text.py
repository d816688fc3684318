from typing import Any

import numpy as np

from mlxflow.data.token_file import Rows
from mlxflow.quantization import judged_text
from mlxflow.quantization.judged_text import PASSAGE, QuantizationTexts, text_warnings

TOKENS = np.random.default_rng(0).integers(0, 50_000, (40, 65)).astype(np.uint16)


def overlap(judging: Any, learned: Any) -> float:
    return judged_text.overlap(Rows(judging, np.full(judging.shape, 3, np.uint8)), learned)


def test_padding_is_no_text_that_was_learned() -> None:
    judging, learned = (np.pad(part, ((0, 0), (0, 100))) for part in (TOKENS[:4], TOKENS[10:]))
    marks = np.pad(np.full((4, 65), 3, np.uint8), ((0, 0), (0, 100)))
    assert judged_text.overlap(Rows(judging, marks), learned) == 0.0
    learned[5, 3:68] = judging[2, :65]
    assert judged_text.overlap(Rows(judging, marks), learned) == 1 / 4  # of the tokens, not of the positions


def test_overlap_counts_tokens_of_passages_that_are_in_both_texts() -> None:
    judging = TOKENS[:4].copy()
    learned = TOKENS[10:].copy()
    assert overlap(judging, learned) == 0.0
    learned[5, 3 : 3 + PASSAGE] = judging[2, 20 : 20 + PASSAGE]
    assert overlap(judging, learned) == PASSAGE / judging.size
    learned[6, : PASSAGE + 8] = judging[2, 20 : 20 + PASSAGE + 8]
    assert overlap(judging, learned) == (PASSAGE + 8) / judging.size
    assert overlap(judging, judging) == 1.0


def test_shorter_passages_are_coincidences() -> None:
    learned = TOKENS[10:].copy()
    learned[5, : PASSAGE - 1] = TOKENS[0, : PASSAGE - 1]
    assert overlap(TOKENS[:4], learned) == 0.0
    assert overlap(TOKENS[:4, : PASSAGE - 1], TOKENS[:, : PASSAGE - 1]) == 0.0


def test_warnings_name_figures_that_flatter_a_method() -> None:
    apart, shared = QuantizationTexts("a", "b", 0.0), QuantizationTexts("a", "b", 0.25)
    assert text_warnings(apart, task="quantize", perplexity_increase=-0.1, learns_text=False) == []
    assert text_warnings(apart, task="quantize", perplexity_increase=0.1, learns_text=True) == []
    assert text_warnings(shared, task="quantize", perplexity_increase=0.1, learns_text=False) == [
        "quantize: 25.0% of the judging tokens are in the text that the method learned: the figures flatter it. Set "
        "validation_sources of another text in [pretokenize]."
    ]
    assert text_warnings(apart, task="quantize", perplexity_increase=-0.1, learns_text=True) == [
        "quantize: the perplexity is lower than the dense model's, since the method learned this kind of text. Judge "
        "by the divergence (kl), or set distill = true."
    ]
