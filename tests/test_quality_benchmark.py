"""The arithmetic of `benchmarks/quality.py`: standard errors over documents, and its table."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import document_rows, ratio, table_of
from mlxflow.data.token_file import TokenFile


def test_the_standard_error_is_that_of_documents_and_not_of_tokens() -> None:
    random = np.random.default_rng(0)
    counts = np.full(400, 50)
    losses = 3 + random.normal(size=400)  # the tokens of a document are alike
    mean, error = ratio(losses * counts, counts)
    assert mean == pytest.approx(losses.mean())
    assert error == pytest.approx(losses.std(ddof=1) / 20, rel=1e-6)
    weighted, _ = ratio(np.array([10.0, 0.0]), np.array([10, 30]))
    assert weighted == 0.25


def test_documents_are_rows_of_their_own_cut_or_padded(built: Path) -> None:
    file = TokenFile.open(built / "artifacts/pretokenize/train.safetensors")
    documents = [document for document in file.documents() if len(document) > 32]
    rows = document_rows(file, 3)
    assert rows.tokens.shape == (min(3, len(documents)), file.context_length + 1)
    for row, document in enumerate(documents[:3]):
        used = min(len(document), file.context_length + 1)
        assert rows.tokens[row, :used].tolist() == document[:used].tolist()
        assert (rows.marks[row] == 3).sum() == used


def test_the_table_compares_with_the_best_of_mlx_lm() -> None:
    common = {
        "model": "m", "bits": 4, "group_size": 64, "bits_per_weight": 4.5, "perplexity_standard_error": 0.1,
        "dense_perplexity": 10.0, "kl": 0.1, "kl_standard_error": 0.01, "seconds": 60.0, "peak_rss_bytes": 1e9,
    }  # fmt: skip
    lines = [
        {**common, "method": method, "perplexity": perplexity}
        for method, perplexity in (("rtn", 15.0), ("gptq", 14.0), ("awq", 12.0), ("block", 11.0), ("block", 11.4))
    ]
    rows = {row.split(" | ")[2]: row.split(" | ") for row in list(table_of(lines))[2:]}
    assert [rows[name][5:7] for name in ("rtn", "gptq", "awq")] == [
        ["50.0%", "2.50"],
        ["40.0%", "2.00"],
        ["20.0%", "1.00"],
    ]
    assert rows["block"][4] == "11.20 ± 0.10 (seeds: ± 0.28)"
    assert rows["block"][5:7] == ["12.0%", "0.60"]
