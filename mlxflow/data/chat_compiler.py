"""Compile a chat template and run it, with or without tracing the origin of its output.

Templates are Jinja as transformers runs it: sandboxed, with `raise_exception`, `tojson`, loop controls and
`{% generation %}` marks. The date that templates can read is fixed, so that equal data gives equal text.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext

from mlxflow.data.chat_tracing import Trace, TracingEnvironment, TracingExtension
from mlxflow.data.control_tokens import marked, unescaped
from mlxflow.data.messages import RecordProblem
from mlxflow.messages.errors import reason_of

#: The date for templates that read the current date: the default of Llama 3's template.
_TODAY = datetime.date(2024, 7, 26)

# The keys under which transformers passes an assistant's reasoning.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]
T = TypeVar("T")


class TemplateProblem(RecordProblem):
    """A conversation that a template refuses; the message is the reason."""


class CompiledTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: what the template may name, such as `bos_token`.

    Raises:
        TemplateProblem: it is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = TracingEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[TracingExtension, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        self._tracing = tracing = TracingExtension.of(environment)
        try:
            self._plain = environment.from_string(source)
            self._traced = environment.from_string(tracing.instrumented(environment.parse(source)))
        except MemoryError:  # the guard names the work in progress
            raise
        except Exception as error:  # untrusted code, compiled by Python: any exception
            raise TemplateProblem(_said(error)) from error
        for template in (self._plain, self._traced):
            template.globals = dict(template.globals)  # a ChainMap would be copied slowly for every conversation
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        """Return the text of a conversation.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        variables = self._variables(tools, prompt=prompt)
        return _first_that_works(messages, lambda form: self._plain.render(messages=form, **variables))

    def trace(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False, origins: bool = True) -> Trace:
        """Return the text of a conversation and the origin of each part.

        Args:
            messages: the conversation.
            tools: JSON schemas of functions, or None.
            prompt: end with what an assistant's turn begins with.
            origins: whether to record `Trace.segments`.

        Raises:
            TemplateProblem: the template refuses the conversation.
        """
        variables = self._variables(tools, prompt=prompt)

        def run(form: list[dict[str, Any]]) -> Trace:
            answers = [answer for message in form for answer in message.get("tool_responses") or ()]
            return self._tracing.trace(self._traced, form, answers, variables, origins=origins)

        return _first_that_works(messages, run)

    def trace_marked(self, messages: Sequence[Message], tools: Any, numbers: Iterable[int]) -> Trace:
        """Return the trace of a conversation with marked contents of some messages; see `Trace.marks`.

        Raises:
            TemplateProblem: the template refuses it.
        """
        chosen = set(numbers)
        changed = [
            {k: v if k == "role" else marked(v) for k, v in message.items()} if number in chosen else message
            for number, message in enumerate(messages)
        ]
        return self.trace(changed, tools)

    def _variables(self, tools: Any, *, prompt: bool) -> dict[str, Any]:
        return {"tools": tools, "documents": None, "add_generation_prompt": prompt, **self._special_tokens}


def _first_that_works(messages: Sequence[Message], run: Callable[[list[dict[str, Any]]], T]) -> T:
    """Return the template's output for the first form of the messages that it accepts."""
    first: TemplateProblem | None = None
    for form in _forms(messages):
        try:
            return run(form)
        except MemoryError:  # the guard names the work in progress
            raise
        except Exception as error:  # untrusted code: any exception
            first = first or TemplateProblem(_said(error))
    raise first or TemplateProblem("it is empty")


def _said(error: Exception) -> str:
    return reason_of(error, None) or type(error).__name__


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield a conversation as transformers passes it, then in the forms that older templates need.

    These need an empty content beside tool calls, or the arguments of a call as JSON text.
    """
    usual = [_with_reasoning(message) for message in messages]
    yield usual
    if any("tool_calls" in message for message in messages):
        empty = [{"content": None, **message} for message in usual]
        yield empty
        yield [_with_text_arguments(message) for message in usual]
        yield [_with_text_arguments(message) for message in empty]


def _with_reasoning(message: Message) -> dict[str, Any]:
    for key in _REASONING_KEYS:
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return dict(message)


def _with_text_arguments(message: Message) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": _tojson(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return unescaped(text) if ensure_ascii else text


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
