"""Items of task files, and a line for each mistake in one."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxflow.evaluation.task_file import mistakes_in, read_task_file

CHOICE = {"prompt": "a", "choices": ["b", "c"], "answer": 1}


def _written(folder: Path, *lines: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("record", "kind", "texts", "right"),
    [
        ({"prompt": "a", "completion": " b"}, "completion", (" b",), 0),
        (CHOICE, "choice", ("b", "c"), 1),
        ({**CHOICE, "answer": "b", "subject": "x"}, "choice", ("b", "c"), 0),
        ({"prompt": "a", "answer": "b"}, "exact match", ("b",), 0),
        ({"prompt": "", "answer": ["b", "B"]}, "exact match", ("b", "B"), 0),
    ],
)
def test_the_keys_tell_the_kind(
    tmp_path: Path, record: dict[str, Any], kind: str, texts: tuple[str, ...], right: int
) -> None:
    read = read_task_file(_written(tmp_path, "", record), "q.jsonl")
    assert (read.kind, read.mistakes) == (kind, [])
    (item,) = read.items
    assert (item.line, item.texts, item.right) == (2, texts, right)


def test_a_conversation_stands_for_the_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi", "name": "x"}]
    path = _written(tmp_path, {"messages": messages, "answer": "hello"})
    read = read_task_file(path, "q.jsonl")
    assert read.needs_chat
    assert read.items[0].messages == ({"role": "user", "content": "hi"},)
    found = list(mistakes_in(path, "q.jsonl", may_chat=False, chat_key='chat = "never"'))
    assert found == ['q.jsonl:1: has messages, and chat = "never" leaves out the chat template. Remove the key.']


BAD = {
    '{"prompt": "a"': "not valid JSON (Expecting ',' delimiter at column 15)",
    "[1]": "expected an object, such as {...}",
    '{"completion": "b"}': 'expected "prompt" or "messages"',
    '{"prompt": 3, "answer": "b"}': "prompt = 3: expected a text",
    '{"prompt": "a"}': 'expected "completion", "choices" with "answer", or "answer"',
    '{"prompt": "a", "completion": "b", "answer": "b"}': 'has "completion" and "answer", of two kinds of items',
    '{"prompt": "a", "completion": " "}': "completion: is empty",
    '{"prompt": "a", "choices": ["b"], "answer": 0}': "choices: expected a list of at least two texts",
    '{"prompt": "a", "choices": ["b", 3], "answer": 0}': "choices[1] = 3: expected a text",
    '{"prompt": "a", "choices": ["b", "c", "b"], "answer": 0}': "choices[2]: is the same text as choices[0]",
    '{"prompt": "a", "choices": ["b", "c"]}': 'lacks "answer", the index or the text of the right choice',
    '{"prompt": "a", "choices": ["b", "c"], "answer": 2}': "answer = 2: expected an index from 0 to 1, "
    "or the text of a choice",
    '{"prompt": "a", "choices": ["b", "c"], "answer": -1}': "answer = -1: expected an index from 0 to 1, "
    "or the text of a choice",
    '{"prompt": "a", "choices": ["b", "c"], "answer": true}': "answer = true: expected an index from 0 to 1, "
    "or the text of a choice",
    '{"prompt": "a", "answer": []}': "answer: expected a text, or a list of accepted texts",
    '{"messages": [], "answer": "b"}': 'messages: expected a list of {"role": ..., "content": ...}',
    '{"messages": [{"role": "user"}], "answer": "b"}': 'messages[0]: expected {"role": ..., "content": ...} with texts',
    '{"messages": [{"role": "assistant", "content": "x"}], "answer": "b"}': "messages: ends with the assistant's turn, "
    "which the model is to write",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    good = {"prompt": "a", "answer": "b"}
    read = read_task_file(_written(tmp_path, line, good), "data/q.jsonl")
    assert read.mistakes == [f"data/q.jsonl:1: {BAD[line]}. Fix the line."]


def test_items_of_two_kinds_are_refused(tmp_path: Path) -> None:
    read = read_task_file(_written(tmp_path, "", CHOICE, {"prompt": "a", "answer": "b"}), "q.jsonl")
    assert read.mistakes == ["q.jsonl:3: is an item of exact match, and line 2 of multiple choice. Fix the line."]


def test_a_file_without_items_and_one_with_many_bad_lines(tmp_path: Path) -> None:
    assert read_task_file(_written(tmp_path, "", " "), "q.jsonl").mistakes == [
        "q.jsonl: has no item. Write one JSON object on each line."
    ]
    mistakes = read_task_file(_written(tmp_path, *["x"] * 25), "q.jsonl").mistakes
    assert len(mistakes) == 11
    assert mistakes[-1] == "q.jsonl: 15 more lines are no items. Fix these first."
