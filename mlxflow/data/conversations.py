"""Convert conversation records of the common data set formats to the messages that chat templates take.

Supported are messages (`role` and `content`, as in OpenAI's format), ShareGPT (`conversations` of `from` and `value`),
prompt and completion, each a text or messages, and Alpaca (`instruction`, `input` and `output`). Keys with a null
value, which tables have in every record, are removed, so that a record is equal from any container.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mlxflow.data.messages import RecordProblem, kind, parse_json_key, parse_json_text, read_messages, without_empty

#: The key of a record's conversation, by form.
CHAT_KEYS = ("messages", "conversations")
COMPLETION_KEYS = ("prompt", "completion")
ALPACA_KEYS = ("instruction", "output")

#: Further keys of a conversation record.
COMPANION_KEYS = ("tools", "functions", "system", "input", "history")


_FLAGS = ("weight", "train")
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"')


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        messages: each with a "role" and possibly "content", "tool_calls", "reasoning_content", "name" ...
        tools: JSON schemas of functions, or None.
        untrained: the numbers, from 0, of assistant messages that are not trained on.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    untrained: frozenset[int] = frozenset()


def read_chat(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `messages` or `conversations`.

    Raises:
        RecordProblem: the record is not valid.
    """
    key = next((key for key in CHAT_KEYS if _is_given(record.get(key))), CHAT_KEYS[0])
    messages = read_messages(record.get(key), key)
    if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return _conversation(messages, record)


def read_completion(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `prompt` and `completion`; only the completion is trained on.

    Raises:
        RecordProblem: the record is not valid.
    """
    prompt, completion = (
        read_messages(record[key], key) if isinstance(record.get(key), list | dict) else [_said(record, key, role)]
        for key, role in zip(COMPLETION_KEYS, ("user", "assistant"), strict=True)
    )
    context = [{**one, "train": False} if one["role"] == "assistant" else one for one in prompt]
    return _conversation([*context, *completion], record)


def read_alpaca(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `instruction`, `output` and perhaps `input`, `system` and `history`.

    Raises:
        RecordProblem: the record is not valid.
    """
    system = [_said(record, "system", "system")] if record.get("system") else []
    question, answer = _said(record, "instruction", "user"), _said(record, "output", "assistant")
    if record.get("input"):
        question["content"] += "\n" + _said(record, "input", "user")["content"]
    earlier: list[dict[str, Any]] = []
    history = record.get("history") or []
    pairs = parse_json_key(history, "history") if isinstance(history, str) else history
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise RecordProblem('"history" is no list of pairs of texts')
        earlier += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _conversation([*system, *earlier, question, answer], record)


#: The reader of each form.
READERS = {"chat": read_chat, "completions": read_completion, "alpaca": read_alpaca}


def form_of(record: Mapping[str, Any], format_: str, text_key: str) -> str:
    """Return the form of a record: "chat", "completions", "alpaca" or "text".

    Args:
        record: an object.
        format_: the expected form; "auto" takes the first form whose keys have values.
        text_key: the key of the text.
    """
    given = {key for key, value in record.items() if _is_given(value)}
    if format_ != "auto":
        is_alpaca = format_ == "completions" and given.issuperset(ALPACA_KEYS) and "completion" not in given
        return "alpaca" if is_alpaca else format_
    for keys in (given, record.keys()):  # tables have keys with null values
        if keys >= set(COMPLETION_KEYS):
            return "completions"
        if keys & set(CHAT_KEYS):
            return "chat"
        if keys >= set(ALPACA_KEYS):
            return "alpaca"
        if text_key in keys:
            break
    return "text"


def has_messages(record: Mapping[str, Any]) -> bool:
    """Return whether the prompt or the completion of a record is a list of messages."""
    return any(isinstance(record.get(key), list | dict) for key in COMPLETION_KEYS)


class Template(Protocol):
    """The interface of chat templates that is used here."""

    @property
    def takes_parts(self) -> bool:
        """Whether it renders a content that is a list of text parts."""

    @property
    def takes_text(self) -> bool:
        """Whether it renders a content that is a text."""


def shaped(messages: Sequence[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """Return messages with contents in a form that a template renders: unchanged, else as text, else as parts."""
    shaped_messages = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and not template.takes_parts:
            message = {**message, "content": "".join(part["text"] for part in content)}
        elif isinstance(content, str) and not template.takes_text and template.takes_parts:
            message = {**message, "content": [{"type": "text", "text": content}]}
        shaped_messages.append(message)
    return shaped_messages


def _is_given(value: object) -> bool:
    return value is not None and value != ""


def _said(record: Mapping[str, Any], key: str, role: str) -> dict[str, Any]:
    """Return a message with the text of a record's key as content."""
    if not isinstance(record.get(key), str):
        raise RecordProblem(f'"{key}" is {kind(record.get(key))}: expected text')
    return {"role": role, "content": record[key]}


def _conversation(messages: list[dict[str, Any]], record: Mapping[str, Any]) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordProblem("has no assistant turn")
    flagged = [number for number, message in enumerate(messages) if "weight" in message or "train" in message]
    if not flagged:
        return Conversation(messages, _tools(record))
    untrained = frozenset(number for number in flagged if _is_untrained(messages[number], number + 1))
    kept = [{key: value for key, value in message.items() if key not in _FLAGS} for message in messages]
    return Conversation(kept, _tools(record), untrained)


def _is_untrained(message: dict[str, Any], number: int) -> bool:
    """Return whether the flags of a message exclude it from training; an invalid flag raises `RecordProblem`."""
    weight, train = message.get("weight", 1), message.get("train")
    if weight not in (0, 1):
        raise RecordProblem(f"message {number}: weight = {json.dumps(weight)}: expected 0 or 1")
    if train not in (None, True, False):
        raise RecordProblem(f"message {number}: train = {json.dumps(train)}: expected true or false")
    if message["role"] != "assistant":
        if train:
            raise RecordProblem(f'message {number}: train = true: only messages of role "assistant" are trained on')
        return False
    return train is False or weight == 0


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a record."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools:  # JSON text, as in tables
        tools = parse_json_key(tools, "tools")
    if not tools and _is_given(functions := record.get("functions")):  # OpenAI's legacy format
        parsed = parse_json_key(functions, "functions") if isinstance(functions, str) else functions
        tools = [{"type": "function", "function": one} for one in parsed] if isinstance(parsed, list) else parsed
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RecordProblem(f'its "tools" are {kind(tools)}: expected a list')
    return [parse_json_key(tool, "tools") if isinstance(tool, str) else without_empty(tool) for tool in tools]


def looks_like_record(value: Any, format_: str, text_key: str) -> bool:
    """Return whether a JSON value is an object with all the keys of a known form.

    Args:
        value: any value.
        format_: the expected form, as in `form_of`.
        text_key: the key of the text.
    """
    if not isinstance(value, dict):
        return False
    is_chat = any(isinstance(value.get(key), list) and value[key] for key in CHAT_KEYS)
    is_completion = any(all(value.get(key) is not None for key in keys) for keys in (COMPLETION_KEYS, ALPACA_KEYS))
    is_text = isinstance(value.get(text_key), str)
    known = {"text": is_text, "chat": is_chat, "completions": is_completion}
    return known.get(format_, is_text or is_chat or is_completion)


def decoded_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of CSV with the cells that contain messages as JSON decoded; an empty cell is null.

    The text of a prompt or a completion may be empty, so these cells are unchanged.

    Raises:
        ValueError: a cell is no valid JSON.
    """
    decoded: dict[str, Any] = {}
    for key, cell in row.items():
        if key in COMPLETION_KEYS and isinstance(cell, str) and _MESSAGES.match(cell):
            decoded[key] = parse_json_text(cell)
        else:
            decoded[key] = None if cell == "" and key in (*CHAT_KEYS, *COMPANION_KEYS) else cell
    return decoded
