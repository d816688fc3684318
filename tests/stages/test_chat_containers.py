"""The same conversations in every container and form give the same rows."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.data.token_file import TokenFile
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import rest_in_matrix

TURNS = [(f"What is {n} plus {n}?", f"It is {2 * n}, of course.") for n in range(12)]

FORMS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TURNS],
    "parts and nulls": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": q}], "tool_calls": None},
                {"role": "assistant", "content": [{"type": "text", "text": a}], "tool_calls": None},
            ],
            "tools": None,
        }
        for q, a in TURNS
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in TURNS],
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in TURNS],
    "completion as messages": [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in TURNS
    ],
}


def _jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _json(path: Path, records: list[dict[str, Any]]) -> None:
    path.with_suffix(".json").write_text(json.dumps(records, indent=1))


def _wrapped_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.with_suffix(".json").write_text(json.dumps({"version": "1.0", "data": records}))


def _csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        for record in records:
            cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
            writer.writerow({key: "" if cell == "null" else cell for key, cell in cells.items()})


def _parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": _jsonl,
    "json": _json,
    "wrapped json": _wrapped_json,
    "csv": _csv,
    "parquet": _parquet,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    _jsonl(folder / "chats", FORMS["messages"])
    table = '[pretokenize]\nsources = ["chats.jsonl"]\ncontext_length = 96\ntokenizer = { vocab_size = 300 }\n'
    (folder / "workflow.toml").write_text(table)
    workflow = load_workflow(folder / "workflow.toml")
    return execute_stage(workflow, workflow.find("pretokenize"))


def _rows(folder: Path, tokenizer: Path, source: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return tokens and marks of every row, trained on and held out, sorted."""
    (folder / "workflow.toml").write_text(
        f'[pretokenize]\nsources = ["{source}"]\ncontext_length = 96\npacking = "none"\nholdout = 0.2\n'
        f'tokenizer = {{ from = "{tokenizer}" }}\n'
    )
    workflow = load_workflow(folder / "workflow.toml")
    made = execute_stage(workflow, workflow.find("pretokenize"))
    found = []
    for side in ("train", "validation"):
        rows = TokenFile.open(made / f"{side}.safetensors").rows
        found += [
            (tuple(map(int, one)), tuple(map(int, marks))) for one, marks in zip(rows.tokens, rows.marks, strict=True)
        ]
    return sorted(found)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> list[Any]:
    folder = tmp_path_factory.mktemp("expected")
    _jsonl(folder / "chats", FORMS["messages"])
    rows = _rows(folder, tokenizer, "chats.jsonl")
    assert len(rows) == len(TURNS)
    assert all(any(mark & 1 for mark in marks) and not all(mark & 1 for mark in marks) for _, marks in rows)
    return rows


def _usual_pairs() -> list[tuple[str, str]]:
    """Return pairs in which each form is in lines of JSON, and each container has plain and nested records."""
    lines = [(form, "jsonl") for form in FORMS]
    return [*lines, *((form, container) for form in ("parts and nulls", "alpaca") for container in WRITERS)]


@pytest.mark.parametrize(("form", "container"), rest_in_matrix(itertools.product(FORMS, WRITERS), *_usual_pairs()))
def test_a_chat_format_gives_the_same_rows_in_each_container(
    tmp_path: Path, tokenizer: Path, expected: list[Any], form: str, container: str
) -> None:
    WRITERS[container](tmp_path / "chats", FORMS[form])
    (file,) = tmp_path.iterdir()
    assert _rows(tmp_path, tokenizer, file.name) == expected


@pytest.mark.parametrize("form", rest_in_matrix(FORMS, "messages"))
def test_a_chat_format_gives_the_same_rows_as_a_data_set(
    tmp_path: Path, tokenizer: Path, expected: list[Any], form: str
) -> None:
    (tmp_path / "set").mkdir()
    _parquet(tmp_path / "set/train", FORMS[form])
    assert _rows(tmp_path, tokenizer, "hf:set") == expected


def test_a_json_file_without_records_is_a_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"name": "x", "list": list(range(400))}))
    marks = [mark for _, marks in _rows(tmp_path, tokenizer, "settings.json") for mark in marks if mark]
    learned = sum(mark & 1 for mark in marks)
    assert learned > 0.9 * len(marks)  # all but the context of the end that is held out
