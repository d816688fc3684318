"""Convert records to documents: the text to tokenize, and the parts that are trained on."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import xxhash

from mlxflow.data import conversations
from mlxflow.data.chat import ChatTemplate, Rendered
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.control_tokens import ReservedCharacterError
from mlxflow.data.conversations import Conversation
from mlxflow.data.items import LONG_TEXT_BYTES, MAX_CONVERSATION_BYTES, Bad, PlainText, Record, RecordForm
from mlxflow.data.long_lines import LongText
from mlxflow.data.messages import RecordProblem, kind
from mlxflow.data.texts import cut, same_size
from mlxflow.data.watched import Work
from mlxflow.storage.paths import printable

Format = Literal["auto", "text", "chat", "completions"]

# Characters of a record's error, and of a key in it, that messages show
_MOST_SHOWN, _MOST_OF_A_KEY = 300, 40

#: The parts of conversations that are trained on: the assistant's turns, the last of them, or every token.
TrainOn = Literal["completion", "last", "all"]


class Document(NamedTuple):
    """A document, or a piece of one that is too long to be held in memory.

    Attributes:
        text: the text to tokenize.
        place: the line or record number in its file; 0 if the file is the document.
        digest: xxh3-128 of the record's content, independent of the template; of a piece, of all up to its end.
        num_bytes: UTF-8 bytes of the text.
        is_templated: whether a template rendered it; in any other document control tokens are plain text.
        spans: the characters that are trained on; None for all.
        literals: (begin, end) of control tokens inside messages of a templated document, which are plain text.
        needs_end: whether an end-of-text token is appended and trained on, because no control token ends the last turn.
        is_conversation: it is not split at the end of a row.
        begins: whether this is the first piece of the text.
        ends: whether this is the last piece of the text.
    """

    text: str
    place: int
    digest: bytes
    num_bytes: int
    is_templated: bool = False
    spans: tuple[tuple[int, int], ...] | None = None
    literals: tuple[tuple[int, int], ...] = ()
    needs_end: bool = False
    is_conversation: bool = False
    begins: bool = True
    ends: bool = True


class Formatter:
    """Converts records to documents.

    Args:
        format_: form of the records; "auto" determines it for each record, with the priority of mlx-lm.
        text_key: the key of a text.
        template: renders conversations; None without one.
        train_on: the parts of conversations that are trained on; None if only the text is needed.
        name: of the records' file.

    Attributes:
        end_tokens: the control tokens that ended a trained turn in any document so far.
        inner_tokens: those of them that also occur inside such a turn.
    """

    def __init__(
        self,
        *,
        format_: Format,
        text_key: str,
        template: ChatTemplate | None,
        train_on: TrainOn | None,
        name: str = "",
    ) -> None:
        self._name = name
        self._format = format_
        self._text_key = text_key
        self._template = template
        self._train_on = train_on
        self._hash = xxhash.xxh3_128()
        self.end_tokens: set[str] = set()
        self.inner_tokens: set[str] = set()

    @property
    def record_form(self) -> RecordForm:
        """The form of the records."""
        companions = frozenset(
            [*conversations.COMPANION_KEYS, *conversations.COMPLETION_KEYS, *conversations.ALPACA_KEYS]
        )
        return RecordForm(
            self._record_keys,
            frozenset() if self._format == "text" else companions,
            lambda value: conversations.looks_like_record(value, self._format, self._text_key),
            conversations.decoded_cells,
            self._text_key,
        )

    @property
    def _record_keys(self) -> frozenset[str]:
        known = {
            "text": {self._text_key},
            "chat": set(conversations.CHAT_KEYS),
            "completions": {*conversations.COMPLETION_KEYS, conversations.ALPACA_KEYS[0]},
        }
        return frozenset(known[self._format] if self._format != "auto" else set().union(*known.values()))

    def documents(self, items: Iterable[Record | PlainText | Bad]) -> Iterator[Document | Bad]:
        """Yield the document of each item, including blank ones."""
        for item in items:
            if isinstance(item, Bad):
                yield item
            elif isinstance(item, PlainText):
                yield self._piece(item)
            else:
                try:
                    yield from self._documents_of(item)
                except TemplateProblem as error:
                    yield Bad(item.place, f"the template refuses it ({_shortened(str(error))}). {error.fix}")
                except RecordProblem as error:
                    yield Bad(item.place, f"{_shortened(str(error))}. {error.fix}")
                except RecursionError:
                    yield Bad(item.place, "is nested too deeply. Fix the record")
                except ReservedCharacterError:
                    yield Bad(item.place, "holds one of U+FDD0 to U+FDD7, which are no characters. Fix the record")

    def _piece(self, item: PlainText) -> Document:
        data = item.text.encode()
        if item.begins:
            self._hash.reset()
        self._hash.update(data)
        digest = self._hash.digest() if item.ends else b""
        return Document(item.text, 0, digest, len(data), begins=item.begins, ends=item.ends)

    def _documents_of(self, record: Record) -> Iterator[Document]:
        """Yield the document of a record; a long text in pieces."""
        value = record.value
        if not isinstance(value, dict):
            raise RecordProblem("expected an object")
        form = conversations.form_of(value, self._format, self._text_key)
        if form == "text":
            yield from self._texts(record.place, value)
            return
        if isinstance(text := value.get(self._text_key), LongText):
            value = {**value, self._text_key: text.text()}
        if form == "completions" and self._template is None and not conversations.has_messages(value):
            yield self._plain_completion(record.place, value)
        else:
            yield self._chat(record.place, conversations.READERS[form](value))

    def _texts(self, place: int, value: dict[str, Any]) -> Iterator[Document]:
        """Yield the document of a record's text, in pieces if it is long, which do not depend on its storage."""
        text = value.get(self._text_key)
        if not isinstance(text, LongText):
            text = self._text(value, self._text_key)
            data = _encode(text)
            if len(data) <= LONG_TEXT_BYTES:
                yield Document(text, place, xxhash.xxh3_128_digest(data), len(data))
                return
            digest, parts = xxhash.xxh3_128_digest(data), iter([data])
            del text, data
        else:
            digest, parts = _digest(text), text.parts()
        begins = True
        for piece, ends in cut(same_size(parts)):
            yield Document(piece.decode(), place, digest if ends else b"", len(piece), begins=begins, ends=ends)
            begins = False

    def _text(self, value: dict[str, Any], key: str) -> str:
        if key not in value:
            has = ", ".join(_shortened(key, _MOST_OF_A_KEY) for key in list(value)[:8])
            raise RecordProblem(f'has no "{key}"{f" (it has {has})" if has else ""}', fix=self._advice_on_keys())
        if not isinstance(value[key], str):
            raise RecordProblem(f'"{key}" is {kind(value[key])}: expected text')
        return str(value[key])

    def _advice_on_keys(self) -> str:
        """Return what to do with a record without any known key, which may be of a form of its own."""
        known = 'Name its keys "messages", "prompt" and "completion", or "text"'
        return f"{known if self._format == 'auto' else 'Fix the record'}, or set text_key"

    def _plain_completion(self, place: int, value: dict[str, Any]) -> Document:
        prompt, completion = (self._text(value, key) for key in conversations.COMPLETION_KEYS)
        text = prompt + completion
        data = _encode(text)
        _require_size(len(data))
        digest = xxhash.xxh3_128_digest(_encode(json.dumps([prompt, completion])))
        spans = ((len(prompt), len(text)),) if self._train_on != "all" else None
        return Document(text, place, digest, len(data), spans=spans, is_conversation=True)

    def _chat(self, place: int, talk: Conversation) -> Document:
        if self._template is None:
            raise NoTemplateError
        with Work(self._template.subject, self._name) as work:
            work.step(place)
            return self._written(self._template, place, talk, work)

    def _written(self, template: ChatTemplate, place: int, talk: Conversation, work: Work) -> Document:
        """Return the document that a template renders from a conversation; the work is announced to the guard."""
        messages = conversations.shaped(talk.messages, template)
        chooses = self._train_on == "last" or bool(talk.untrained)
        content = [talk.messages, talk.tools, *([sorted(talk.untrained)] if talk.untrained else [])]
        encoded = json.dumps(content, sort_keys=True)
        _require_size(len(encoded))
        digest = xxhash.xxh3_128_digest(encoded.encode())
        work.step(place, len(encoded))
        if self._train_on is None:
            text = template.render(messages, tools=talk.tools)
            return Document(text, place, digest, len(_encode(text)), is_templated=True, is_conversation=True)
        rendered = template.render_turns(messages, tools=talk.tools, owners=chooses, encoded=encoded)
        trained = self._trained(talk, rendered)
        if self._train_on != "all":
            spans: tuple[tuple[int, int], ...] | None = trained
        else:
            spans = _others(rendered, trained) if talk.untrained else None
        return Document(
            rendered.text,
            place,
            digest,
            len(_encode(rendered.text)),
            is_templated=True,
            spans=spans,
            literals=rendered.literals,
            needs_end=self._needs_end(template, rendered, trained),
            is_conversation=True,
        )

    def _trained(self, talk: Conversation, rendered: Rendered) -> tuple[tuple[int, int], ...]:
        """Return the spans of the trained turns; empty if the template omits the answers.

        Raises:
            RecordProblem: the turns cannot be attributed to messages.
        """
        turns = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        chosen = set(turns[-1:] if self._train_on == "last" else turns) - talk.untrained
        if len(chosen) == len(turns) or not chosen:
            return rendered.spans if chosen else ()
        owners: tuple[int | None, ...] = rendered.owners
        if None in owners:
            if len(owners) != len(turns):
                raise RecordProblem("the template does not show which of its {% generation %} blocks is which message")
            owners = tuple(turns)
        return tuple(span for span, owner in zip(rendered.spans, owners, strict=True) if owner in chosen)

    def _needs_end(self, template: ChatTemplate, rendered: Rendered, trained: tuple[tuple[int, int], ...]) -> bool:
        """Return whether no control token ends any trained turn and the text ends with such a turn.

        The control tokens that do are recorded.
        """
        has_end_token = False
        for begin, end in trained:
            token, at = template.control_tokens.ending(rendered.text, begin, end, rendered.literals)
            if token:
                has_end_token = True
                self.end_tokens.add(token)
                if token not in self.inner_tokens and rendered.text.find(token, begin, at) >= 0:
                    self.inner_tokens.add(token)
        return not has_end_token and bool(trained) and not rendered.text[trained[-1][1] :].strip()


class NoTemplateError(Exception):
    """There are conversations, but the tokenizer has no chat template."""


def _others(rendered: Rendered, trained: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the spans of a text without the turns that are not trained on."""
    spans, at = [], 0
    for begin, end in rendered.spans:
        if (begin, end) not in trained:
            spans.append((at, begin))
            at = end
    return tuple(span for span in [*spans, (at, len(rendered.text))] if span[0] < span[1])


def _digest(text: LongText) -> bytes:
    """Return the xxh3-128 of a long text; this validates all of it before any piece is used."""
    digest = xxhash.xxh3_128()
    try:
        for part in text.parts():
            digest.update(part)
    except ValueError as error:
        raise RecordProblem(f"not valid JSON ({error})") from error
    return digest.digest()


def _require_size(size: int) -> None:
    if size > MAX_CONVERSATION_BYTES:
        raise RecordProblem(
            f"holds a conversation of {size:,} bytes, {MAX_CONVERSATION_BYTES:,} are the most", fix="Split the record"
        )


def _shortened(text: str, most: int = _MOST_SHOWN) -> str:
    """Return the beginning of a text, which may quote a record of any length, on one line."""
    return printable(text if len(text) <= most else f"{text[:most]} ...")


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RecordProblem(f"character {error.start:,} is half of a surrogate pair") from error
