"""Items of an evaluation task in a JSONL file, and every mistake in it; imports neither mlx nor numpy.

Each line is an object of one of three kinds, and all lines of a file are of the same kind:

    {"prompt": ..., "completion": ...}                 the completion's log-likelihood
    {"prompt": ..., "choices": [...], "answer": ...}   the likeliest choice; `answer` is its index or its text
    {"prompt": ..., "answer": ...}                     the generated text; `answer` is a text or a list of texts

`messages`, a conversation that ends before the assistant's turn, may stand for `prompt`. Other keys are ignored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlxflow.data.json_records import decode_json

Kind = Literal["completion", "choice", "exact match"]

#: The largest file of items.
MAX_TASK_BYTES = 1 << 30

# The most mistakes that are listed of a file
_MAX_MISTAKES = 10

_ADVICE = "Fix the line."


class TaskItem(NamedTuple):
    """One item of a task.

    Attributes:
        line: in its file, from 1.
        prompt: the text before the answer; empty if there are messages.
        messages: of a conversation; empty if there is a prompt.
        texts: the completion, the choices, or the accepted answers.
        right: the index of the right choice; 0 for the other kinds.
    """

    line: int
    prompt: str
    messages: tuple[Mapping[str, str], ...]
    texts: tuple[str, ...]
    right: int


class TaskFile(NamedTuple):
    """The items of a file.

    Attributes:
        kind: of all items.
        items: in the order of the file.
        mistakes: lines such as `questions.jsonl:7: answer = 4: ...`; if there are any, the items are incomplete.
    """

    kind: Kind
    items: list[TaskItem]
    mistakes: list[str]

    @property
    def needs_chat(self) -> bool:
        """Whether an item is a conversation."""
        return any(item.messages for item in self.items)


class _MistakenLineError(Exception):
    """A line is no item; the message says why, without its position."""


def read_task_file(path: Path, shown: str) -> TaskFile:
    """Read the items of a file.

    Args:
        path: of the file.
        shown: its name for messages.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_TASK_BYTES:
        return TaskFile("completion", [], [f"{shown}: has over {MAX_TASK_BYTES:,} bytes. Split it into several tasks."])
    kind, first = "", 0
    items: list[TaskItem] = []
    mistakes: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not (line.strip() if number > 1 else line.removeprefix(b"\xef\xbb\xbf").strip()):
                continue
            try:
                own, item = _item(line, number)
                if kind and own != kind:
                    raise _MistakenLineError(f"is an item of {_described(own)}, and line {first} of {_described(kind)}")
            except _MistakenLineError as error:
                mistakes.append(f"{shown}:{number}: {error}. {_ADVICE}")
                continue
            kind, first = own, first or number
            items.append(item)
    if not items and not mistakes:
        mistakes.append(f"{shown}: has no item. Write one JSON object on each line.")
    if (more := len(mistakes) - _MAX_MISTAKES) > 0:
        mistakes = [*mistakes[:_MAX_MISTAKES], f"{shown}: {more:,} more lines are no items. Fix these first."]
    return TaskFile(kind or "completion", items, mistakes)  # type: ignore[arg-type]


def _described(kind: str) -> str:
    return {"completion": "prompt and completion", "choice": "multiple choice"}.get(kind, "exact match")


def _item(line: bytes, number: int) -> tuple[str, TaskItem]:
    try:
        value = decode_json(line.rstrip(b"\r\n"))
    except ValueError as error:
        raise _MistakenLineError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _MistakenLineError("expected an object, such as {...}")
    prompt, messages = _prompt(value)
    kinds: dict[str, Callable[[dict[str, Any]], tuple[tuple[str, ...], int]]] = {
        "completion": _completion,
        "choices": _choices,
        "answer": _answers,
    }
    named = [key for key in kinds if key in value]
    if "completion" in named and len(named) > 1:
        raise _MistakenLineError(f'has "completion" and "{named[1]}", of two kinds of items')
    if not named:
        raise _MistakenLineError('expected "completion", "choices" with "answer", or "answer"')
    texts, right = kinds[named[0]](value)
    kind = {"completion": "completion", "choices": "choice", "answer": "exact match"}[named[0]]
    return kind, TaskItem(number, prompt, messages, texts, right)


def _prompt(value: Mapping[str, Any]) -> tuple[str, tuple[Mapping[str, str], ...]]:
    if ("prompt" in value) == ("messages" in value):
        raise _MistakenLineError('expected "prompt" or "messages"')
    if "prompt" in value:
        return _text(value["prompt"], "prompt", may_be_empty=True), ()
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise _MistakenLineError('messages: expected a list of {"role": ..., "content": ...}')
    for index, one in enumerate(messages):
        if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("role", "content")):
            raise _MistakenLineError(f'messages[{index}]: expected {{"role": ..., "content": ...}} with texts')
    if messages[-1]["role"] == "assistant":
        raise _MistakenLineError("messages: ends with the assistant's turn, which the model is to write")
    return "", tuple({"role": one["role"], "content": one["content"]} for one in messages)


def _completion(value: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    return (_text(value["completion"], "completion"),), 0


def _choices(value: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    choices = value["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise _MistakenLineError("choices: expected a list of at least two texts")
    texts = tuple(_text(one, f"choices[{index}]") for index, one in enumerate(choices))
    if len(set(texts)) < len(texts):
        again = next(index for index, text in enumerate(texts) if text in texts[:index])
        raise _MistakenLineError(f"choices[{again}]: is the same text as choices[{texts.index(texts[again])}]")
    if "answer" not in value:
        raise _MistakenLineError('lacks "answer", the index or the text of the right choice')
    return texts, _right(value["answer"], texts)


def _right(answer: object, texts: Sequence[str]) -> int:
    """Return the index of the right choice."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str) and answer in texts:
        return texts.index(answer)
    expected = f"expected an index from 0 to {len(texts) - 1}, or the text of a choice"
    raise _MistakenLineError(f"answer = {_shown(answer)}: {expected}")


def _answers(value: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    answer = value["answer"]
    if isinstance(answer, list):
        if not answer:
            raise _MistakenLineError("answer: expected a text, or a list of accepted texts")
        return tuple(_text(one, f"answer[{index}]") for index, one in enumerate(answer)), 0
    return (_text(answer, "answer"),), 0


def _text(value: object, key: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _MistakenLineError(f"{key} = {_shown(value)}: expected a text")
    if not may_be_empty and not value.strip():
        raise _MistakenLineError(f"{key}: is empty")
    return value


def _shown(value: object) -> str:
    """Return a JSON value for a message, shortened."""
    import json

    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mistakes_in(path: Path, shown: str, *, may_chat: bool, chat_key: str) -> Iterator[str]:
    """Yield a line for each mistake in a file of items.

    Args:
        path: of the file.
        shown: its name for messages.
        may_chat: whether the items may be conversations.
        chat_key: the setting that says so, for messages.

    Raises:
        OSError: it cannot be read.
    """
    read = read_task_file(path, shown)
    yield from read.mistakes
    if not may_chat and read.needs_chat:
        line = next(item.line for item in read.items if item.messages)
        yield f"{shown}:{line}: has messages, and {chat_key} leaves out the chat template. Remove the key."
