"""Conversations as a chat template writes them, and which characters of that an assistant wrote."""

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
        text: what the template wrote.
        spans: (begin, end) of what an assistant wrote, its end-of-turn token included.
        literals: (begin, end) of control tokens that are part of a message: they are text.
        owners: for each span the number of its message; None where the template does not show it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    literals: tuple[tuple[int, int], ...] = ()
    owners: tuple[int | None, ...] = ()


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: what the template may name, such as `bos_token`.
        control_tokens: texts that are control tokens where the template writes them, and text in a message; without
            them, those that the source names.
        subject: the template's name, as a message begins.

    Raises:
        TemplateProblem: it is no valid template.
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
            messages: with the keys "role" and "content" and what else the template knows.
            tools: JSON schemas of functions, or None.
            prompt: end with what an assistant's turn begins with.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        return self._compiled.render(messages, tools, prompt=prompt)

    def render_turns(
        self, messages: Sequence[Message], *, tools: Any = None, owners: bool = False, encoded: str | None = None
    ) -> Rendered:
        """Return the text of a conversation with the spans that its assistants wrote; see `chat_turns`.

        Args:
            messages: as `render` takes them.
            tools: JSON schemas of functions, or None.
            owners: also say which message each span belongs to.
            encoded: messages and tools as ASCII JSON, where there is such a text already.

        Raises:
            TemplateProblem: the template refuses the conversation, or leaves a part of it out.
            ReservedCharacterError: a text holds a noncharacter that is used here.
        """
        if self.control_tokens.may_be_in(encoded or json.dumps([messages, tools])):
            messages = [
                {key: value if key == "role" else self.control_tokens.enclosed(value) for key, value in one.items()}
                for one in messages
            ]
            tools = self.control_tokens.enclosed(tools)
        origins = owners or self._finder.needs_origins(messages)
        trace = self._compiled.trace(messages, tools, origins=origins)
        found = self._finder.find(messages, tools, trace)
        spans = tuple((begin, end) for begin, end, _ in found)
        return Rendered(trace.text, spans, trace.literals, tuple(self._finder.owners(trace, found)) if owners else ())

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template writes the texts of a content that is a list of parts."""
        return self._writes([{"type": "text", "text": _PROBE}])

    @cached_property
    def takes_text(self) -> bool:
        """Whether the template writes a content that is text."""
        return self._writes(_PROBE)

    def _writes(self, content: Any) -> bool:
        try:
            text = self.render([{"role": "user", "content": content}])
        except TemplateProblem:
            return False
        return _PROBE in text and re.search("['\"]text['\"]", text) is None


def markers(source: str) -> list[str]:
    """Return the control tokens that a template writes, each once, in the order in which they stand in its source."""
    return list(dict.fromkeys(_MARKER.findall(source)))
