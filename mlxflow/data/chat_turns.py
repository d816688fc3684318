"""Find the characters of a rendered conversation that belong to the assistant's turns.

A template with `{% generation %}` blocks marks them itself. For other templates, a turn is the output of the loop
iteration at the assistant's message, without the header that the generation prompt ends with and without content of
other messages, such as tool results.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from mlxflow.data.chat_compiler import CompiledTemplate, Message, TemplateProblem
from mlxflow.data.chat_tracing import Trace
from mlxflow.data.control_tokens import ControlTokens

#: (begin, end, number of the message) of a part of an assistant's turn.
Span = tuple[int, int, int | None]

# Opens an assistant's reasoning. Some generation prompts end with it; it still counts as part of the turn.
_THOUGHTS = re.compile(r"[<\[][^<>\[\]]*(?:think|thought)", re.IGNORECASE)

# What to do with a conversation whose tools a template omits
_RENDER_TOOLS = 'Use a chat_template that renders tools, such as "chatml"'

_TALKERS = ("system", "developer", "user", "assistant")

_CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}

# Probe conversations whose next turn is the assistant's.
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "f", "content": "a"},
    ],
)


class TurnFinder:
    """Finds the assistant's turns in rendered conversations.

    Args:
        template: renders the conversations.
        control_tokens: candidates for the end-of-turn token.
        end_of_text: the text of the end-of-text token, or "".
        has_marks: whether the template has `{% generation %}` blocks.
    """

    def __init__(
        self, template: CompiledTemplate, control_tokens: ControlTokens, *, end_of_text: str, has_marks: bool
    ) -> None:
        self._template = template
        self._control_tokens = control_tokens
        self._end_of_text = end_of_text
        self._has_marks = has_marks

    def needs_origins(self, messages: Sequence[Message]) -> bool:
        """Return whether finding the turns of a conversation needs a trace with segments."""
        return not self._has_marks or any(message["role"] not in _TALKERS for message in messages)

    def find(self, messages: Sequence[Message], tools: Any, trace: Trace) -> list[Span]:
        """Return the spans in the trace of a conversation, in order.

        Raises:
            TemplateProblem: the template omits a part of the conversation.
        """
        _check_calls(messages, tools, trace.text)
        answers = self._answers_elsewhere(messages, tools, trace)
        if self._has_marks:
            return [(begin, end, None) for begin, end in trace.generated if begin < end]
        regions = list(_regions(trace, messages))
        spans = [span for region in regions for span in self._turn(messages, tools, trace, *region)]
        shown = {number for number, _, _ in regions}
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and number not in shown and message.get("content"):
                spans += self._turn_elsewhere(messages, tools, trace, number)
        for low, high in answers:
            spans = [part for span in spans for part in _without(span, low, high)]
        return sorted(spans)

    @staticmethod
    def owners(trace: Trace, spans: Sequence[Span]) -> list[int | None]:
        """Return the message number of each span; None if unknown."""
        return [owner if owner is not None else _owner(trace, begin) for begin, _, owner in spans]

    def _turn(
        self, messages: Sequence[Message], tools: Any, trace: Trace, number: int, begin: int, end: int
    ) -> Iterator[Span]:
        """Yield the spans written by the assistant within the part of the text that belongs to its message."""
        text = trace.text
        is_first = not any(owner == number and stop <= begin for _, stop, owner in trace.segments)
        if is_first:
            begin += self._header_length(messages, tools, number, text[begin:end])
        end = begin + len(text[begin:end].rstrip(" "))
        follows = self._end_of_text and text.startswith(self._end_of_text, end)
        if follows and not self._control_tokens.ending(text, begin, end)[0]:
            end += len(self._end_of_text)
        if begin < end:
            yield begin, end, number

    # --- headers

    def _header_length(self, messages: Sequence[Message], tools: Any, number: int, text: str) -> int:
        """Return the length of the header, with which the generation prompt ends, at the start of a message's text."""
        if length := _length_of_one(self._headers, text):
            return length
        if not self._headers:
            return 0
        try:
            return _length_of_one(self._headers_after(messages[:number], tools), text)
        except TemplateProblem:  # a conversation that begins with an assistant
            return 0

    @cached_property
    def _headers(self) -> list[str]:
        """The endings of the template's generation prompts, longest first; empty if it has none."""
        headers: set[str] = set()
        for probe in _PROBES:
            try:
                headers.update(self._headers_after(probe, None))
            except TemplateProblem:
                continue
        return sorted(headers, key=lambda header: (-len(header), header))

    def _headers_after(self, messages: Sequence[Message], tools: Any) -> list[str]:
        """Return candidates for the header of the generation prompt, without opened reasoning.

        Most templates write it after their loop over the messages, some in its last iteration.
        """
        trace = self._template.trace(messages, tools, prompt=True)
        without = self._template.trace(messages, tools)
        begin = max((end for _, end, owner in trace.segments if owner is not None), default=len(trace.text))
        same = 0
        while same < min(len(trace.blocks), len(without.blocks)) and trace.blocks[same] == without.blocks[same]:
            same += 1
        found = (trace.text[begin:], "".join(trace.blocks[same:]))
        cut = (_THOUGHTS.split(header, maxsplit=1)[0] for header in found)
        return [header for header in cut if header.strip()]

    # --- templates that do not loop over the messages, or write one message in the iteration of another

    def _answers_elsewhere(self, messages: Sequence[Message], tools: Any, trace: Trace) -> list[tuple[int, int]]:
        """Return the parts of a text with tool results for which no loop iteration writes anything.

        Raises:
            TemplateProblem: the template omits such a result.
        """
        others = [number for number, one in enumerate(messages) if one["role"] not in _TALKERS and one.get("content")]
        shown = {owner for _, _, owner in trace.segments} if others else set()
        parts: list[tuple[int, int]] = []
        for number in others:
            if number in shown:
                continue
            marked = self._template.trace_marked(messages, tools, [number])
            if marked.text == trace.text and not marked.marks:
                role = messages[number]["role"]
                raise TemplateProblem(f'it leaves out message {number + 1}, of role "{role}"')
            parts += marked.marked_blocks if marked.text == trace.text else ()
        return parts

    def _turn_elsewhere(self, messages: Sequence[Message], tools: Any, trace: Trace, number: int) -> Iterator[Span]:
        """Yield an assistant's turn, with its end token, for which no loop iteration writes anything."""
        marked = self._template.trace_marked(messages, tools, [number])
        for begin, end in marked.marks if marked.text == trace.text else ():
            yield begin, self._end_of_turn(trace.text, end), number

    def _end_of_turn(self, text: str, end: int) -> int:
        """Return the end of a turn whose content ends at a position: after a control token that follows it."""
        for token in sorted(self._control_tokens.texts, key=len, reverse=True):
            if text.startswith(token, end):
                after = end + len(token)
                return after + text.startswith("\n", after)
        return end


def _regions(trace: Trace, messages: Sequence[Message]) -> Iterator[tuple[int, int, int]]:
    """Yield (number, begin, end) of the parts of a text that belong to an assistant's message."""
    number, begin, end = -1, 0, 0
    for low, high, owner in trace.segments:
        if owner == number and low == end:
            end = high
            continue
        if begin < end:
            yield number, begin, end
        is_turn = owner is not None and owner >= 0 and messages[owner]["role"] == "assistant"
        number, begin, end = (owner, low, high) if is_turn and owner is not None else (-1, 0, 0)
    if begin < end:
        yield number, begin, end


def _owner(trace: Trace, at: int) -> int | None:
    return next((owner for begin, end, owner in trace.segments if begin <= at < end), None)


def _length_of_one(headers: Iterable[str], text: str) -> int:
    return next((length for header in headers if (length := _header_at(text, header))), 0)


def _header_at(text: str, header: str) -> int:
    """Return the length of the white space and header at the start of a text; 0 without a header."""
    core = header.lstrip()
    begin = len(text) - len(text.lstrip())
    for wanted in (core, core.rstrip()):
        if wanted and text.startswith(wanted, begin):
            return begin + len(wanted)
    return 0


def _without(span: Span, begin: int, end: int) -> Iterator[Span]:
    low, high, number = span
    if end <= low or begin >= high:
        yield span
        return
    if low < begin:
        yield low, begin, number
    if end < high:
        yield end, high, number


def _check_calls(messages: Sequence[Message], tools: Any, text: str) -> None:
    """Refuse a text that omits the tool calls or the tools of its conversation.

    Raises:
        TemplateProblem: one of them is missing.
    """
    for number, message in enumerate(messages, 1):
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in text:
                name = call["function"]["name"]
                raise TemplateProblem(f'it leaves out the call of "{name}" in message {number}', fix=_RENDER_TOOLS)
    names = _names(tools or ())
    if names and not any(name in text for name in names):
        raise TemplateProblem(f'it leaves out the tools ("{names[0]}")', fix=_RENDER_TOOLS)


def _names(tools: Iterable[Any]) -> list[str]:
    parts = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [part["name"] for part in parts if isinstance(part, dict) and isinstance(part.get("name"), str)]
