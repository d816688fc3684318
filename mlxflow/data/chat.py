"""Render conversations with a chat template, and find the characters that an assistant wrote."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from mlxflow.data.chat_compiler import CompiledTemplate, Message, TemplateProblem
from mlxflow.data.chat_turns import TurnFinder
from mlxflow.data.control_tokens import ControlTokens
from mlxflow.data.watched import Work

_MARKER = re.compile(r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "Xq7"


class Rendered(NamedTuple):
    """A conversation as text; all positions are in characters.

    Attributes:
        text: output of the template.
        spans: (begin, end) of the assistant's turns, each with its end-of-turn token.
        literals: (begin, end) of control tokens inside a message, which are plain text.
        owners: for each span the number of its message; None if it cannot be determined.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    literals: tuple[tuple[int, int], ...] = ()
    owners: tuple[int | None, ...] = ()


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: variables for the template, such as `bos_token`.
        control_tokens: texts that are control tokens if the template writes them, and plain text inside a message;
            None: those that the source contains.
        subject: the template's name, for the beginning of error messages.

    Raises:
        TemplateProblem: the template is invalid.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        control_tokens: Iterable[str] | None = None,
        *,
        subject: str = "the chat template",
    ) -> None:
        self.source = source
        self.subject = subject
        with Work(subject, size=len(source)):
            self._compiled = CompiledTemplate(source, special_tokens)
        known = [*markers(source), *special_tokens.values()] if control_tokens is None else control_tokens
        self.control_tokens = ControlTokens(known)
        self._finder = TurnFinder(
            self._compiled,
            self.control_tokens,
            end_of_text=special_tokens.get("eos_token", ""),
            has_marks=_GENERATION.search(source) is not None,
        )

    def render(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            messages: with the keys "role", "content" and others that the template supports.
            tools: JSON schemas of functions, or None.
            prompt: append the header of an assistant's turn.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        return self._compiled.render(messages, tools, prompt=prompt)

    def render_turns(
        self, messages: Sequence[Message], *, tools: Any = None, owners: bool = False, encoded: str | None = None
    ) -> Rendered:
        """Return the text of a conversation with the spans of its assistant's turns; see `chat_turns`.

        Args:
            messages: as `render` takes them.
            tools: JSON schemas of functions, or None.
            owners: also return the message of each span.
            encoded: messages and tools as ASCII JSON, if already encoded.

        Raises:
            TemplateProblem: the template refuses the conversation or omits a part of it.
            ReservedCharacterError: a text contains a noncharacter that is reserved here.
        """
        if self.control_tokens.may_be_in(encoded or json.dumps([messages, tools])):
            messages = [
                {key: value if key == "role" else self.control_tokens.enclosed(value) for key, value in message.items()}
                for message in messages
            ]
            tools = self.control_tokens.enclosed(tools)
        origins = owners or self._finder.needs_origins(messages)
        trace = self._compiled.trace(messages, tools, origins=origins)
        turns = self._finder.find(messages, tools, trace)
        spans = tuple((begin, end) for begin, end, _ in turns)
        return Rendered(trace.text, spans, trace.literals, tuple(self._finder.owners(trace, turns)) if owners else ())

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders a content that is a list of text parts."""
        return self._writes([{"type": "text", "text": _PROBE}])

    @cached_property
    def takes_text(self) -> bool:
        """Whether the template renders a content that is a text."""
        return self._writes(_PROBE)

    def _writes(self, content: Any) -> bool:
        try:
            text = self.render([{"role": "user", "content": content}])
        except TemplateProblem:
            return False
        return _PROBE in text and re.search("['\"]text['\"]", text) is None


def markers(source: str) -> list[str]:
    """Return the control tokens in a template's source, each once, in order."""
    return list(dict.fromkeys(_MARKER.findall(source)))
