"""A chat template that a watched process runs; see `mlxflow.data.guard`. Slow to start, for a few conversations."""

from collections.abc import Mapping, Sequence
from functools import cache

from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chat_compiler import Message
from mlxflow.data.guard import guarded
from mlxflow.data.watched import Work


class GuardedTemplate:
    """A compiled chat template of others.

    Args:
        source: the Jinja text.
        special_tokens: what the template may name, such as `bos_token`.
        subject: the template's name, as a message begins.

    Raises:
        TemplateProblem: it is no valid template.
        SourceError: compiling it takes too much time or memory.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], subject: str) -> None:
        self._known = (source, tuple(sorted(special_tokens.items())), subject)
        guarded(f"{__name__}:check", *self._known)

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the text of a conversation; see `ChatTemplate.render`.

        Raises:
            TemplateProblem: the template refuses the conversation.
            SourceError: it takes too much time or memory.
        """
        text: str = guarded(f"{__name__}:render", *self._known, list(messages), prompt)
        return text


@cache
def _opened(source: str, special_tokens: tuple[tuple[str, str], ...], subject: str) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), subject=subject)


def check(source: str, special_tokens: tuple[tuple[str, str], ...], subject: str) -> None:
    """Compile a template, in the watched process."""
    _opened(source, special_tokens, subject)


def render(
    source: str, special_tokens: tuple[tuple[str, str], ...], subject: str, messages: list[Message], prompt: bool
) -> str:
    """Return the text of a conversation, in the watched process."""
    template = _opened(source, special_tokens, subject)
    with Work(subject, size=sum(len(str(message)) for message in messages)):
        return template.render(messages, prompt=prompt)
