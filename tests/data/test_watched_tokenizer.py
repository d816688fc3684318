from typing import Any

import pytest

from mlxflow.data import guard
from tests.data.test_guard import (
    _MEMORY,
    _SMALL,
    _Job,
    job,  # noqa: F401
)


def _multiplies(definition: dict[str, Any]) -> None:
    steps = [{"type": "Replace", "pattern": {"String": a}, "content": b * 2000} for a, b in ("ab", "bc", "cd")]
    definition["normalizer"] = {"type": "Sequence", "normalizers": steps}


def _backtracks(definition: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"(?:a|a)*[^a\n]"}, "behavior": "Isolated"}
    both = [split | {"invert": False}, definition["pre_tokenizer"]]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}


_TOKENIZER = 'pretokenize.tokenizer.from = "mine": its tokenizer.json'


def test_a_normalizer_that_multiplies_text_is_one_error_line(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(guard, "LIMITS", _SMALL)
    assert job.fails(job.tokenizer(_multiplies)) == f"{_TOKENIZER} {_MEMORY}"


def test_a_pattern_that_backtracks_is_one_error_line(job: _Job, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    job.write(3, text="a" * 300)
    line = job.fails(job.tokenizer(_backtracks))
    assert line.startswith(_TOKENIZER)
    assert "processor time" in line or " failed (" in line
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_with_dropout_is_refused(job: _Job) -> None:  # noqa: F811
    line = job.fails(job.tokenizer(lambda definition: definition["model"].update(dropout=0.1)))
    assert line == f"{_TOKENIZER} has model.dropout = 0.1: two runs would give different ids. Set it to null."
