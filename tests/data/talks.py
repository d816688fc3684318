"""Conversations and chat templates that tests render: thirteen talks, and templates of the shapes that models use.

Each template in `templates/` has `{% generation %}` marks where a training version of it has them.
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlxflow.data.chat import markers
from mlxflow.data.tokenizer import train_tokenizer

Talk = list[dict[str, Any]]

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).with_name("templates").glob("*")}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    """Return what a user says."""
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    """Return what an assistant says."""
    return {"role": "assistant", "content": content, **more}


def _call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "123456789", "function": {"name": "add", "arguments": arguments}}


def _told(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "tool_call_id": "123456789", "content": content}


TALKS: dict[str, Talk] = {
    "one turn": [user("Hi"), assistant("Hello.")],
    "system": [{"role": "system", "content": "Be short."}, user("Hi"), assistant("Hello.")],
    "empty": [user("Hi"), assistant(""), user("Again"), assistant("x")],
    "stripped": [user("  Hi \n"), assistant("\n  Hello. \n "), user(" x "), assistant(" \ty ")],
    "repeated": [user("Same"), assistant("Same"), user("Same"), assistant("Same"), user("Same"), assistant("Same")],
    "successive": [user("a"), user("b"), assistant("c"), assistant("d"), user("e"), assistant("f")],
    "tools": [user("1+2?"), assistant("", tool_calls=[_call(a=1, b=2)]), _told("3"), assistant("Three.")],
    "calls and words": [
        user("1+2?"),
        assistant("Let me see.", tool_calls=[_call(a=1, b=2)]),
        _told("3"),
        assistant("Three."),
        user("and 7?"),
        assistant("", tool_calls=[_call(a=5, b=2)]),
        _told("7"),
        assistant("Seven."),
    ],
    "thinking": [
        user("One?"),
        assistant("Yes.", reasoning_content="hm"),
        user("Two?"),
        assistant("No.", reasoning_content="well"),
    ],
    "thinking in text": [
        user("One?"),
        assistant("<think>\nhm\n</think>\n\nYes."),
        user("Two?"),
        assistant("<think>\nwell\n</think>\n\nNo."),
    ],
    "ends with a user": [user("Hi"), assistant("Hello."), user("Bye")],
    "unicode": [{"role": "system", "content": "é"}, user("é🙂"), assistant("🙂é\u2028x"), user("ж"), assistant("שלום")],
    "looks like a template": [
        user("assistant\n"),
        assistant("user\nassistant\n<think>"),
        user("Assistant: x"),
        assistant("[inst] Assistant: y <start_of"),
    ],
}


def talk_for(template: str, name: str) -> tuple[Talk, list[dict[str, Any]] | None]:
    """Return a talk in the form that a template takes, and its tools."""
    messages = TALKS[name]
    if template == "smolvlm":
        messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    return messages, TOOLS if any("tool_calls" in message for message in messages) else None


def without_marks(source: str) -> str:
    """Return a template without its generation marks, white space as it was."""
    plain = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", source)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", plain)


def tokenizer_for_all() -> Tokenizer:
    """Return a byte-level tokenizer that knows the control tokens of every template."""
    control_tokens = [*NAMES.values(), *(marker for source in TEMPLATES.values() for marker in markers(source))]
    built = ["<|system|>", "<|user|>", "<|assistant|>", "<end_of_utterance>", "<turn|>", "[|endofturn|]", "<|turn>"]
    texts = [str(message["content"]) for talk in TALKS.values() for message in talk]
    return train_tokenizer(texts * 3, vocab_size=700, special_tokens=dict.fromkeys([*control_tokens, *built]))
