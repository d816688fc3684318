"""Messages of a conversation in the forms of OpenAI and ShareGPT, converted to the form that chat templates take."""

import json
import re
from typing import Any

#: The keys for the role of a message, and the common names of each role.
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


_MAX_ROLE_LENGTH = 100


class RecordProblem(Exception):  # noqa: N818 - becomes a bad record
    """An unusable record; the message is the reason.

    Args:
        text: why.
        fix: what to do.
    """

    def __init__(self, text: str, *, fix: str = "Fix the record") -> None:
        super().__init__(text)
        self.fix = fix


def kind(value: object) -> str:
    """Return the type of a JSON value in JSON's words, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def read_messages(value: Any, key: str) -> list[dict[str, Any]]:
    """Return messages without null keys and with standard role names; an invalid one raises `RecordProblem`."""
    if isinstance(value, str):  # JSON text, as in tables
        value = parse_json_key(value, key)
    if isinstance(value, dict):  # columns: the datasets library's representation of a list of objects
        value = _rows(value)
    if not isinstance(value, list) or not value:
        raise RecordProblem(f'expected "{key}", a list that is not empty')
    return [one if _is_plain(one) else _message(one, number) for number, one in enumerate(value, 1)]


def _is_plain(message: Any) -> bool:
    """Return whether a message consists of a standard role and a text, as most do."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ("system", "user", "assistant")
        and type(message.get("content")) is str
    )


def parse_json_key(text: str, key: str) -> Any:
    """Parse the JSON text of a record's key.

    Raises:
        RecordProblem: it is not valid.
    """
    try:
        return parse_json_text(text)
    except ValueError as error:
        raise RecordProblem(f'its "{key}" are not valid JSON ({error})') from error


def parse_json_text(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not valid; the message is for the user.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the only remaining cause
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
    """Return a JSON value without keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_empty(one) for key, one in value.items() if one is not None}
    return [without_empty(one) for one in value] if isinstance(value, list) else value


def _check_content(message: dict[str, Any], number: int) -> None:
    """Refuse a content that is neither text nor a list of texts; such a list is normalized."""
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
    """Convert a ShareGPT message whose value is one or more calls to a message with tool_calls."""
    value = message.pop("content", None)
    try:
        calls = parse_json_text(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RecordProblem(f"message {number}: its call is not valid JSON ({error})") from error
    return {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _calls(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Remove the tool calls from a message and return them in OpenAI's format, with arguments as an object."""
    calls = message.pop("tool_calls", None) or []
    if isinstance(calls, str):
        calls = parse_json_key(calls, "tool_calls")
    if isinstance(calls, dict):
        calls = _rows(calls)
    if "function_call" in message:  # OpenAI's legacy format
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
            arguments = parse_json_text(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RecordProblem(f"{place}: its arguments are not valid JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise RecordProblem(f"{place}: its arguments are {kind(arguments)}: expected an object")
    outer = {key: value for key, value in call.items() if function is not call and key != "function"}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}
