"""A chat template that runs in a guarded process, for a few conversations; see `mlxflow.data.guard`."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chat_compiler import Message
from mlxflow.data.watched import Work
from mlxflow.messages.errors import SourceError

_MOST_CHARACTERS, _CHARACTERS_PER_CHARACTER = 1 << 24, 64


class GuardedTemplate:
    """A compiled untrusted chat template.

    Args:
        source: the Jinja text.
        special_tokens: variables for the template, such as `bos_token`.
        subject: the template's name, for the beginning of error messages.
        call: calls a function in the process; see `Guard.call`.

    Raises:
        TemplateProblem: the template is invalid.
        SourceError: compiling it takes too much time or memory.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], subject: str, call: Callable[..., Any]) -> None:
        self._call = call
        self._known = (source, tuple(sorted(special_tokens.items())), subject)
        call(f"{__name__}:check", *self._known)

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the text of a conversation; see `ChatTemplate.render`.

        Raises:
            TemplateProblem: the template refuses the conversation.
            SourceError: it takes too much time or memory, or its output is too long.
        """
        text: str = self._call(f"{__name__}:render", *self._known, list(messages), prompt)
        return text


@cache
def _opened(source: str, special_tokens: tuple[tuple[str, str], ...], subject: str) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), subject=subject)


def check(source: str, special_tokens: tuple[tuple[str, str], ...], subject: str) -> None:
    """Compile a template; called in the guarded process."""
    _opened(source, special_tokens, subject)


def render(
    source: str, special_tokens: tuple[tuple[str, str], ...], subject: str, messages: list[Message], prompt: bool
) -> str:
    """Return the text of a conversation; called in the guarded process."""
    template = _opened(source, special_tokens, subject)
    size = sum(len(str(message)) for message in messages)
    with Work(subject, size=size):
        text = template.render(messages, prompt=prompt)
    if len(text) > _MOST_CHARACTERS + _CHARACTERS_PER_CHARACTER * size:  # the calling process has to hold it, too
        raise SourceError(
            f"{subject} writes {len(text):,} characters for a conversation of {size:,}. Fix it or name another."
        )
    return text
