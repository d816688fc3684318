"""Records of conversations, in the forms in which data sets keep them, as one form that chat templates know.

Known are messages (`role` and `content`, as OpenAI writes them), ShareGPT (`conversations` of `from` and `value`),
prompt and completion, each a text or messages, and Alpaca (`instruction`, `input` and `output`). Keys without a value,
which tables have for every record, are left out everywhere, so that a record is the same from any container.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

#: The key of a record's conversation, by form.
CHAT_KEYS = ("messages", "conversations")
COMPLETION_KEYS = ("prompt", "completion")
ALPACA_KEYS = ("instruction", "output")

#: What a record of a conversation may have besides.
COMPANION_KEYS = ("tools", "functions", "system", "input", "history")

#: What names the speaker of a message.
_SPEAKER_KEYS = ("role", "from")

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_FLAGS = ("weight", "train")
_MAX_ROLE_LENGTH = 100
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"')


class RecordProblem(Exception):  # noqa: N818 - becomes a bad record
    """A record that cannot be used; the text says why.

    Args:
        text: why.
        fix: what to do.
    """

    def __init__(self, text: str, *, fix: str = "Fix the record") -> None:
        super().__init__(text)
        self.fix = fix


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        messages: each with a "role" and what else it has: "content", "tool_calls", "reasoning_content", "name" ...
        tools: JSON schemas of functions, or None.
        untrained: the numbers of the assistants' messages that are not trained on, from 0.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    untrained: frozenset[int] = frozenset()


def read_chat(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `messages` or `conversations`.

    Raises:
        RecordProblem: it is none.
    """
    key = next((key for key in CHAT_KEYS if _is_given(record.get(key))), CHAT_KEYS[0])
    found = _messages(record.get(key), key)
    if isinstance(record.get("system"), str) and record["system"] and found[0]["role"] != "system":
        found = [{"role": "system", "content": record["system"]}, *found]
    return _conversation(found, record)


def read_completion(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `prompt` and `completion`; only the completion is trained on.

    Raises:
        RecordProblem: it is none.
    """
    prompt, completion = (
        _messages(record[key], key) if isinstance(record.get(key), list | dict) else [_said(record, key, role)]
        for key, role in zip(COMPLETION_KEYS, ("user", "assistant"), strict=True)
    )
    asked = [{**one, "train": False} if one["role"] == "assistant" else one for one in prompt]
    return _conversation([*asked, *completion], record)


def read_alpaca(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record with `instruction`, `output` and perhaps `input`, `system` and `history`.

    Raises:
        RecordProblem: it is none.
    """
    system = [_said(record, "system", "system")] if record.get("system") else []
    question, answer = _said(record, "instruction", "user"), _said(record, "output", "assistant")
    if record.get("input"):
        question["content"] += "\n" + _said(record, "input", "user")["content"]
    earlier: list[dict[str, Any]] = []
    history = record.get("history") or []
    pairs = _parsed(history, "history") if isinstance(history, str) else history
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise RecordProblem('"history" is no list of pairs of texts')
        earlier += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _conversation([*system, *earlier, question, answer], record)


#: What reads a record of each form.
READERS = {"chat": read_chat, "completions": read_completion, "alpaca": read_alpaca}


def form_of(record: Mapping[str, Any], format_: str, text_key: str) -> str:
    """Return the form of a record: "chat", "completions", "alpaca" or "text".

    Args:
        record: an object.
        format_: what it should be; "auto" takes the first form whose keys have values.
        text_key: the key of a text.
    """
    given = {key for key, value in record.items() if _is_given(value)}
    if format_ != "auto":
        is_alpaca = format_ == "completions" and given.issuperset(ALPACA_KEYS) and "completion" not in given
        return "alpaca" if is_alpaca else format_
    for keys in (given, record.keys()):  # tables have keys without a value
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
    """What is asked of a chat template here."""

    @property
    def takes_parts(self) -> bool:
        """Whether it writes the texts of a content that is a list of parts."""

    @property
    def takes_text(self) -> bool:
        """Whether it writes a content that is text."""


def shaped(messages: Sequence[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """Return messages with contents in a form that a template writes: as they are, else as text, else as parts."""
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and not template.takes_parts:
            message = {**message, "content": "".join(part["text"] for part in content)}
        elif isinstance(content, str) and not template.takes_text and template.takes_parts:
            message = {**message, "content": [{"type": "text", "text": content}]}
        made.append(message)
    return made


def _is_given(value: object) -> bool:
    return value is not None and value != ""


def _said(record: Mapping[str, Any], key: str, role: str) -> dict[str, Any]:
    """Return a message whose content is the text under a key of a record."""
    if not isinstance(record.get(key), str):
        raise RecordProblem(f'"{key}" is {kind(record.get(key))}: expected text')
    return {"role": role, "content": record[key]}


def kind(value: object) -> str:
    """Return what a JSON value is, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    """Return a list of messages without empty keys, roles by their usual names; what is wrong with one is raised."""
    if isinstance(value, str):  # as tables keep them
        value = _parsed(value, key)
    if isinstance(value, dict):  # columns, as the datasets library keeps a list of objects
        value = _rows(value)
    if not isinstance(value, list) or not value:
        raise RecordProblem(f'expected "{key}", a list that is not empty')
    return [one if _is_plain(one) else _message(one, number) for number, one in enumerate(value, 1)]


def _is_plain(message: Any) -> bool:
    """Return whether a message is what most are: nothing but a usual role and a text."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ("system", "user", "assistant")
        and type(message.get("content")) is str
    )


def _parsed(text: str, key: str) -> Any:
    try:
        return _loads(text)
    except ValueError as error:
        raise RecordProblem(f'its "{key}" are not valid JSON ({error})') from error


def _loads(text: str) -> Any:
    """Return the value of JSON that stands in a text.

    Raises:
        ValueError: it is not valid, or nobody can mean it; the text is for people.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # no other one is left
        raise ValueError("a number has too many digits") from error


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    lists = list(columns.values())
    if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _message(value: Any, number: int) -> dict[str, Any]:
    message = without_empty(value)
    speaker = _SPEAKER_KEYS[0]
    if isinstance(message, dict) and "role" not in message and "from" in message:
        speaker = "from"
        message = {("content" if key == "value" else key): one for key, one in message.items()}
    if not isinstance(message, dict) or not isinstance(message.get(speaker), str):
        raise RecordProblem(f'message {number}: expected an object with a "role"')
    role = message.pop(speaker)
    if speaker == "from" and role in ("function_call", "tool_call"):
        role, message = "assistant", _with_call(message, number)
    if len(role) > _MAX_ROLE_LENGTH or not re.fullmatch(r"[\w.-]+", role):
        shown = repr(role[:_MAX_ROLE_LENGTH]) + " ..." * (len(role) > _MAX_ROLE_LENGTH)
        raise RecordProblem(f"message {number}: role {shown}: expected a name such as user or assistant")
    message = {"role": _ROLES.get(role, role), **message}
    _check_content(message, number)
    if calls := _calls(message, number):
        message["tool_calls"] = calls
    return message


def without_empty(value: Any) -> Any:
    """Return a JSON value without the keys that have no value."""
    if isinstance(value, dict):
        return {key: without_empty(one) for key, one in value.items() if one is not None}
    return [without_empty(one) for one in value] if isinstance(value, list) else value


def _check_content(message: dict[str, Any], number: int) -> None:
    """Refuse a content that is neither text nor a list of texts; such a list gets its usual form."""
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(part, number, index) for index, part in enumerate(content, 1)]
    elif content is not None and not isinstance(content, str):
        raise RecordProblem(f'message {number}: "content" is {kind(content)}: expected text')
    elif content is None and not any(message.get(key) for key in ("tool_calls", "function_call")):
        raise RecordProblem(f'message {number}: expected a "content"')


def _part(part: Any, number: int, index: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    what = f'of type "{part["type"]}"' if isinstance(part, dict) and "type" in part else "no text"
    raise RecordProblem(f"message {number}: part {index} of its content is {what}: only text can be trained on")


def _with_call(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a message of ShareGPT whose value is a call, or several, as one with tool_calls."""
    value = message.pop("content", None)
    try:
        calls = _loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RecordProblem(f"message {number}: its call is not valid JSON ({error})") from error
    return {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _calls(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Take the calls of tools out of a message and return them as OpenAI writes them, arguments as an object."""
    calls = message.pop("tool_calls", None) or []
    if isinstance(calls, str):
        calls = _parsed(calls, "tool_calls")
    if isinstance(calls, dict):
        calls = _rows(calls)
    if "function_call" in message:  # of OpenAI's first form
        calls = [message.pop("function_call")]
    if not isinstance(calls, list):
        raise RecordProblem(f'message {number}: "tool_calls" is {kind(calls)}: expected a list')
    return [_call(call, f"message {number}: call {index}") for index, call in enumerate(calls, 1)]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordProblem(f'{place}: expected an object with the "name" of a function')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RecordProblem(f"{place}: its arguments are not valid JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise RecordProblem(f"{place}: its arguments are {kind(arguments)}: expected an object")
    outer = {key: value for key, value in call.items() if function is not call and key != "function"}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


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
    """Return whether the flags of a message say that it is not trained on; what is wrong with one is raised."""
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
    if isinstance(tools, str) and tools:  # as tables keep them
        tools = _parsed(tools, "tools")
    if not tools and _is_given(functions := record.get("functions")):  # of OpenAI's first form
        parsed = _parsed(functions, "functions") if isinstance(functions, str) else functions
        tools = [{"type": "function", "function": one} for one in parsed] if isinstance(parsed, list) else parsed
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RecordProblem(f'its "tools" are {kind(tools)}: expected a list')
    return [_parsed(tool, "tools") if isinstance(tool, str) else without_empty(tool) for tool in tools]


def looks_like_record(value: Any, format_: str, text_key: str) -> bool:
    """Return whether a JSON value is an object with all the keys of a known form.

    Args:
        value: any.
        format_: what records hold, as in `form_of`.
        text_key: the key of a text.
    """
    if not isinstance(value, dict):
        return False
    is_chat = any(isinstance(value.get(key), list) and value[key] for key in CHAT_KEYS)
    is_completion = any(all(value.get(key) is not None for key in keys) for keys in (COMPLETION_KEYS, ALPACA_KEYS))
    is_text = isinstance(value.get(text_key), str)
    known = {"text": is_text, "chat": is_chat, "completions": is_completion}
    return known.get(format_, is_text or is_chat or is_completion)


def decoded_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of CSV with its cells that hold messages as JSON decoded; an empty cell is one without a value.

    The text of a prompt or a completion may be empty, so theirs stays as it is.

    Raises:
        ValueError: one is no valid JSON.
    """
    made: dict[str, Any] = {}
    for key, cell in row.items():
        if key in COMPLETION_KEYS and isinstance(cell, str) and _MESSAGES.match(cell):
            made[key] = _loads(cell)
        else:
            made[key] = None if cell == "" and key in (*CHAT_KEYS, *COMPANION_KEYS) else cell
    return made
