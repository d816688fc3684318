"""The arithmetic of `benchmarks/quality.py`: standard errors over documents, and its table."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality_judge import document_rows, ratio
from benchmarks.quality_rows import UNIFORM, rows_of
from benchmarks.quality_table import table_of
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
        "model": "m", "size": "w4g64", "nats_lost": 0.1, "bits_per_weight": 4.5, "perplexity_standard_error": 0.1,
        "dense_perplexity": 10.0, "kl": 0.1, "kl_standard_error": 0.01, "seconds": 60.0, "peak_rss_bytes": 1e9,
        "peak_memory_bytes": 5e8,
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


def _arguments(**changes: Any) -> argparse.Namespace:
    usual = {
        "model": "m", "methods": "dense,rtn,gptq,dynamic,scales,uniform,budget", "widths": "3,2", "group_size": 64,
        "budgets": "3.0", "budget_methods": "rtn", "seeds": "0,1", "embedding_bits": 0, "calibration_rows": 4,
    }  # fmt: skip
    return argparse.Namespace(**(usual | changes))


def test_the_rows_are_what_each_method_has_and_have_names_of_their_own() -> None:
    rows = list(rows_of(_arguments()))
    assert [(row.label, row.size) for row in rows if not row.seed] == [
        ("dense", "dense"),
        ("rtn", "w3g64"),
        ("dynamic", "w3g64"),
        ("scales", "w3g64"),
        ("rtn", "w2g64"),
        ("gptq", "w2g64"),
        ("scales", "w2g64"),
        ("uniform-rtn", "3.0 bits"),
        ("budget-rtn", "3.0 bits"),
    ]
    assert sum(row.label == "dense" for row in rows) == 1  # it does not depend on the seed
    assert len({(row.variant, row.seed) for row in rows}) == len(rows)
    with pytest.raises(SystemExit, match="--methods: gtpq: expected some of dense, rtn"):
        list(rows_of(_arguments(methods="gtpq")))


def test_the_embedding_may_have_other_bits_than_the_blocks(tmp_path: Path) -> None:
    parsed = _arguments(methods="rtn", widths="2", embedding_bits=4)
    row = next(rows_of(parsed))
    assert row.size == "w2g64e4"
    table = quality._table(parsed, row, tmp_path, tmp_path)
    assert (table["bits"], table["layers"]) == (2, [{"match": "*embed_tokens", "bits": 4}])
    assert "layers" not in quality._table(_arguments(methods="rtn"), row, tmp_path, tmp_path)


def test_uniform_plans_have_the_size_of_their_budget() -> None:
    assert all(bits + 32 / group_size == size for size, (bits, group_size) in UNIFORM.items())


def test_no_row_is_begun_after_the_seconds_and_finished_rows_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "_dense", lambda name, folder: folder)
    parsed = _arguments(folder=tmp_path, device="auto", seconds=-1.0, documents=1, methods="dense,rtn", seeds="0")
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "m rtn w3g64 seed 0"}) + "\n")
    assert quality._run(parsed) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "-1 s are over: 2 rows are left\n"
