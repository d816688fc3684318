"""A chat template as a Go template for an Ollama Modelfile: the texts around the messages, read off its output.

Ollama does not execute Jinja. Most chat templates write a fixed text before and after each message, by role; these are
found by rendering short conversations, and checked on longer ones. A template that does more has no such form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mlxflow.data.chat_compiler import Message, TemplateProblem
from mlxflow.data.guard import Guard
from mlxflow.data.guarded_template import GuardedTemplate
from mlxflow.messages.errors import SourceError

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Sys tem 1", "Ques tion 2", "Ans wer 3", "Nex t 4"


class TurnTexts(NamedTuple):
    """The texts around the messages of a conversation.

    Attributes:
        begin: before the first message if that is not the system's.
        system: before and after the system's message.
        user: before a user's message.
        assistant: before and after an assistant's message, the end of the user's turn included.
        answer: after the last user's message, where the model begins.
    """

    begin: str
    system: tuple[str, str]
    user: str
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that ends with a user's message, with the generation prompt."""
        around = {"system": self.system, "user": (self.user, ""), "assistant": self.assistant}
        turns = [
            f"{before}{message['content']}{after}"
            for message in messages
            for before, after in [around[message["role"]]]
        ]
        begin = "" if messages[0]["role"] == "system" else self.begin
        return begin + "".join(turns) + self.answer

    def go_template(self) -> str:
        """Return the Go template; empty if a text cannot be written in a Modelfile."""
        texts = (self.begin, *self.system, self.user, *self.assistant, self.answer)
        if any('"""' in text for text in texts):
            return ""
        begin, before_system, after_system, user, before_answer, after_answer, answer = map(_literal, texts)
        return (
            f"{{{{ if not .System }}}}{begin}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{before_system}{{{{ .Content }}}}{after_system}'
            f'{{{{ else if eq .Role "user" }}}}{user}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{before_answer}{{{{ .Content }}}}{after_answer}'
            f"{{{{ end }}}}{{{{ end }}}}{answer}"
        )


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def turn_texts(source: str, special_tokens: Mapping[str, str], *, subject: str, bos: str) -> TurnTexts | None:
    """Return the texts around the messages; None if a template does not have this form, or is invalid.

    Args:
        source: the Jinja text.
        special_tokens: its variables, such as `bos_token`.
        subject: the template's name, for messages.
        bos: the token that the tokenizer itself puts before a text; empty if it puts none. It is left out.
    """
    with Guard() as guard:
        try:
            template = GuardedTemplate(source, special_tokens, subject, guard.call)

            def render(messages: Sequence[Message]) -> str:
                return template.render(messages, prompt=True).removeprefix(bos)

            texts = _texts(render)
            conversations = [_conversation(*roles) for roles in _CHECKED]
            return texts if all(render(one) == texts.render(one) for one in conversations) else None
        except (TemplateProblem, SourceError, ValueError):
            return None


_CHECKED = (
    ("user",),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)


def _conversation(*roles: str) -> list[Message]:
    return [{"role": role, "content": f"Turn {number}: the {role} wrote this."} for number, role in enumerate(roles)]


def _texts(render: Callable[[Sequence[Message]], str]) -> TurnTexts:
    """Return the texts that three short conversations show.

    Raises:
        ValueError: a message is not in the output, or twice.
    """
    question = {"role": "user", "content": _QUESTION}
    alone = render([question])
    with_system = render([{"role": "system", "content": _SYSTEM}, question])
    longer = render([question, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}])
    head, answer = _cut(alone, _QUESTION)
    before_system, after_system, _ = _cut(with_system, _SYSTEM, _QUESTION)
    _, before_answer, after_answer, _ = _cut(longer, _QUESTION, _ANSWER, _NEXT)
    user = _common_end(head, after_system, after_answer)
    return TurnTexts(
        begin=head.removesuffix(user),
        system=(before_system, after_system.removesuffix(user)),
        user=user,
        assistant=(before_answer, after_answer.removesuffix(user)),
        answer=answer,
    )


def _cut(text: str, *messages: str) -> list[str]:
    """Return the parts of a text between messages.

    Raises:
        ValueError: a message is missing, or repeated.
    """
    parts = []
    for message in messages:
        if text.count(message) != 1:
            raise ValueError("the template repeats or drops a message")
        part, _, text = text.partition(message)
        parts.append(part)
    return [*parts, text]


def _common_end(*texts: str) -> str:
    """Return the longest text that all of some texts end with."""
    first = texts[0]
    return next(first[begin:] for begin in range(len(first) + 1) if all(one.endswith(first[begin:]) for one in texts))


def modelfile(file: str, template: str, *, texts: TurnTexts | None, stops: Sequence[str], context_length: int) -> str:
    """Return an Ollama Modelfile.

    Args:
        file: name of the GGUF file beside it.
        template: the chat template; empty for none.
        texts: see `turn_texts`; None without a template or if it has no such form.
        stops: texts of the tokens that end a turn.
        context_length: of the model, in tokens.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file}", f"PARAMETER num_ctx {context_length}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.strip()]
    go_template = texts.go_template() if texts else ""
    if go_template:
        lines.append(f'TEMPLATE """{go_template}"""')
    elif template:
        lines.append("# The chat template in the GGUF file has no form as a Go template: write TEMPLATE by hand.")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
