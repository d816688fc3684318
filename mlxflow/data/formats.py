"""From a record to a document: what is tokenized, and which part of it is trained on."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import xxhash

from mlxflow.data.chat import ChatTemplate, TemplateProblem, check_messages
from mlxflow.data.records import Bad, Record, Text

Format = Literal["auto", "text", "chat", "completions"]

_COMPLETION_KEYS = ("prompt", "completion")


class Document(NamedTuple):
    """A document, or a piece of one too long to be held.

    Attributes:
        text: what is tokenized.
        place: the line or the record's number in its file, 0 where the file is the document.
        digest: xxh3-128 of what the file says, whatever the template; of a piece, of all up to its end.
        num_bytes: UTF-8 bytes of the text.
        is_templated: a template wrote its control tokens; in any other document they are plain text.
        spans: the characters trained on, where not all of them are.
        is_conversation: not to be cut where a row ends.
        begins: the text's first piece is this one.
        ends: the text's last piece is this one.
    """

    text: str
    place: int
    digest: bytes
    num_bytes: int
    is_templated: bool = False
    spans: tuple[tuple[int, int], ...] | None = None
    is_conversation: bool = False
    begins: bool = True
    ends: bool = True


class Formatter:
    """Makes documents of records.

    Args:
        format_: what the records hold; "auto" asks each of them, in the order in which mlx-lm asks.
        text_key: the key of a text.
        template: writes conversations, or None.
        masks_prompts: train on what assistants wrote alone.
    """

    def __init__(self, *, format_: Format, text_key: str, template: ChatTemplate | None, masks_prompts: bool) -> None:
        self._format = format_
        self._text_key = text_key
        self._template = template
        self._masks = masks_prompts
        self._hash = xxhash.xxh3_128()

    @property
    def record_keys(self) -> frozenset[str]:
        """The keys of which a record has one."""
        known = {"text": {self._text_key}, "chat": {"messages"}, "completions": set(_COMPLETION_KEYS)}
        return frozenset(known[self._format] if self._format != "auto" else set().union(*known.values()))

    def documents(self, items: Iterable[Record | Text | Bad]) -> Iterator[Document | Bad]:
        """Yield the document of each item; blank ones too."""
        for item in items:
            if isinstance(item, Bad):
                yield item
            elif isinstance(item, Text):
                yield self._piece(item)
            else:
                try:
                    yield self._document(item)
                except _BadRecord as error:
                    yield Bad(item.place, str(error))
                except TemplateProblem as error:
                    yield Bad(item.place, f"the template refuses it ({error}). Fix the record")

    def _piece(self, item: Text) -> Document:
        data = item.text.encode()
        if item.begins:
            self._hash.reset()
        self._hash.update(data)
        digest = self._hash.digest() if item.ends else b""
        return Document(item.text, 0, digest, len(data), begins=item.begins, ends=item.ends)

    def _document(self, record: Record) -> Document:
        value = record.value
        if not isinstance(value, dict):
            raise _BadRecord("expected an object. Fix the record")
        format_ = self._format if self._format != "auto" else self._guess(value)
        if format_ == "text":
            text = self._text(value, self._text_key)
            data = _encode(text)
            return Document(text, record.place, xxhash.xxh3_128_digest(data), len(data))
        if format_ == "completions":
            return self._completion(record.place, value)
        return self._chat(record.place, value.get("messages"), value.get("tools"))

    def _guess(self, value: dict[str, Any]) -> Format:
        if all(key in value for key in _COMPLETION_KEYS):
            return "completions"
        return "chat" if "messages" in value else "text"

    def _text(self, value: dict[str, Any], key: str) -> str:
        if key not in value:
            has = ", ".join(list(value)[:8])
            raise _BadRecord(f'has no "{key}"{f" (it has {has})" if has else ""}. Fix the record or name its key')
        if not isinstance(value[key], str):
            said = "null" if value[key] is None else f"a {type(value[key]).__name__}"
            raise _BadRecord(f'"{key}" is {said}: expected text. Fix the record')
        return str(value[key])

    def _completion(self, place: int, value: dict[str, Any]) -> Document:
        prompt, completion = (self._text(value, key) for key in _COMPLETION_KEYS)
        if self._template is not None:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._chat(place, messages, value.get("tools"))
        text = prompt + completion
        data = _encode(text)
        digest = xxhash.xxh3_128_digest(_encode(json.dumps([prompt, completion])))
        spans = ((len(prompt), len(text)),) if self._masks else None
        return Document(text, place, digest, len(data), spans=spans, is_conversation=True)

    def _chat(self, place: int, messages: Any, tools: Any) -> Document:
        for problem in check_messages(messages):
            raise _BadRecord(f"{problem}. Fix the record")
        if self._template is None:
            raise NoTemplateError
        if isinstance(tools, str):  # as tables keep them
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise _BadRecord(f'its "tools" are not valid JSON ({error}). Fix the record') from error
        if self._masks:
            text, spans = self._template.render_turns(messages, tools=tools)
        else:
            text, spans = self._template.render(messages, tools=tools), ()
        digest = xxhash.xxh3_128_digest(_encode(json.dumps([messages, tools], sort_keys=True)))
        return Document(
            text,
            place,
            digest,
            len(_encode(text)),
            is_templated=True,
            spans=spans if self._masks else None,
            is_conversation=True,
        )


class NoTemplateError(Exception):
    """There are conversations, and the tokenizer has no template for them."""


class _BadRecord(Exception):  # noqa: N818 - becomes a `Bad`
    pass


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecord(f"character {error.start:,} is half of a surrogate pair. Fix the record") from error
