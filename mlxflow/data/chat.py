"""Conversations as a chat template writes them, and which characters of that an assistant wrote.

Templates are Jinja as transformers runs it: sandboxed, with `raise_exception`, `tojson`, loop controls and
`{% generation %}` marks. The date that some templates write is a fixed one, so that the same data gives the same text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

#: Written by templates that ask for today's date; the one that Llama 3 writes when it is told none.
_TODAY = "26 Jul 2024"

#: The template of a tokenizer that is trained here, in OpenAI's ChatML.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Noncharacters: no text holds them, Unicode keeps them for a program's own use.
_BEGIN, _END, _CONTENT = "\ufdd0", "\ufdd1", "\ufdd2"

_MARKER = re.compile(r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]")

Message = Mapping[str, Any]


class TemplateProblem(Exception):  # noqa: N818 - becomes a bad record
    """A conversation that a template refuses; the text says why."""


class Rendered(NamedTuple):
    """A conversation as text, and the spans of characters that an assistant wrote, end-of-turn included."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: what the template may name, such as `bos_token`.

    Raises:
        TemplateProblem: it is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda _: _TODAY
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateProblem(str(error)) from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def render(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str:
        """Return the text of a conversation.

        Args:
            messages: with the keys "role" and "content" and what else the template knows.
            tools: JSON schemas of functions, or None.
            prompt: end with what an assistant's turn begins with.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        text = self._render(messages, tools, prompt=prompt)
        return text.replace(_BEGIN, "").replace(_END, "") if self._has_marks else text

    def _render(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise TemplateProblem(" ".join(str(error).split()) or type(error).__name__) from error

    def render_turns(self, messages: Sequence[Message], *, tools: Any = None) -> Rendered:
        """Return the text of a conversation with the spans of its assistant turns.

        A template with `{% generation %}` marks tells the spans itself. Else each turn is found by what changes in
        the text when its content is replaced, which holds for templates that strip, drop or add something; from
        where the prompt for the turn ends to where the turn ends, so that its end is learnt too.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        if self._has_marks:
            return _split_marks(self._render(messages, tools))
        text = self._render(messages, tools)
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        spans: list[tuple[int, int]] = []
        for index in turns:
            begin, end = self._find_turn(text, messages, tools, index)
            if spans:
                begin = max(begin, spans[-1][1])
            if begin < end:
                spans.append((begin, end))
        return Rendered(text, tuple(spans))

    def _find_turn(self, text: str, messages: Sequence[Message], tools: Any, index: int) -> tuple[int, int]:
        """Return where in the text of the whole conversation one assistant's turn begins and ends."""
        changed = [*messages[:index], _with_other_content(messages[index]), *messages[index + 1 :]]
        whole = self._render(changed, tools)
        if whole == text:
            return 0, 0  # the template leaves the turn out
        begin, end = _difference(text, whole)
        until = self._render(messages[: index + 1], tools)
        _, content_end = _difference(until, self._render(changed[: index + 1], tools))
        end += _common_prefix(until[content_end:], text[end:])
        before, prompt = self._prompt(messages[:index], tools)
        if prompt and len(prompt) <= begin and text.startswith(prompt):
            return len(prompt), end
        # Turns before this one were written differently when they were the last, or the prompt begins the answer.
        after = min(begin, self._end_of_content(text, messages, tools, index - 1) if index else 0)
        header = prompt[_common_prefix(before, prompt) :]
        return after + _end_of_header(text[after:begin], header), end

    def _end_of_content(self, text: str, messages: Sequence[Message], tools: Any, index: int) -> int:
        """Return where the content of a message ends; 0 where the template leaves it out."""
        changed = [*messages[:index], _with_other_content(messages[index]), *messages[index + 1 :]]
        try:
            whole = self._render(changed, tools)
        except TemplateProblem:
            return 0
        return _difference(text, whole)[1] if whole != text else 0

    def _prompt(self, messages: Sequence[Message], tools: Any) -> tuple[str, str]:
        """Return a conversation without and with what the template writes to ask for an assistant's turn."""
        try:
            return self._render(messages, tools), self._render(messages, tools, prompt=True)
        except TemplateProblem:  # a conversation that begins with an assistant
            return "", ""

    def markers(self) -> list[str]:
        """Return the control tokens that the template writes, each once, in the order in which they stand there."""
        return list(dict.fromkeys(_MARKER.findall(self.source)))


def _difference(text: str, other: str) -> tuple[int, int]:
    """Return the begin and end of the part of a text that is not in the other."""
    begin = _common_prefix(text, other)
    return begin, max(begin, len(text) - _common_prefix(text[::-1], other[::-1]))


def _common_prefix(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is much faster than characters one by one
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _end_of_header(text: str, header: str) -> int:
    """Return where in the text before an assistant's content the prompt for it ends.

    The text may hold more than the prompt (a block of empty thoughts) or less (the prompt begins the thoughts).
    """
    at = text.rfind(header) if header else -1
    return at + len(header) if at >= 0 else len(text)


def _with_other_content(message: Message) -> Message:
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": _CONTENT}] if parts else _CONTENT}


def _split_marks(text: str) -> Rendered:
    parts = re.split(f"([{_BEGIN}{_END}])", text)
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    at = begin = 0
    for part in parts:
        if part == _BEGIN:
            begin = at
        elif part == _END:
            spans.append((begin, at))
        else:
            plain.append(part)
            at += len(part)
    return Rendered("".join(plain), tuple(span for span in spans if span[0] < span[1]))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` puts marks around what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(text: str) -> jinja2.nodes.Node:
            return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)]).set_lineno(line)

        return [mark(_BEGIN), *body, mark(_END)]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def check_messages(messages: object) -> Iterator[str]:
    """Yield what is wrong with a record's messages; nothing when a template can be asked for them."""
    if not isinstance(messages, list) or not messages:
        yield 'expected "messages", a list that is not empty'
        return
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            yield f'message {number}: expected an object with a "role"'
            return
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            yield f'message {number}: expected a "content"'
            return
        if isinstance(content, str) and re.search(f"[{_BEGIN}{_END}{_CONTENT}]", content):
            yield f"message {number}: holds U+FDD0, U+FDD1 or U+FDD2, which are no characters"
            return
    if not any(message["role"] == "assistant" for message in messages):
        yield "has no assistant turn"
