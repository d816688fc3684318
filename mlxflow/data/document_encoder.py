"""Encode documents to tokens, with the spans that are trained on."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxflow.data.control_tokens import LiteralEncoder
from mlxflow.data.documents import Document
from mlxflow.data.encoder import Encoder, TokenSpans, overlapping
from mlxflow.data.tokenizer import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray


class EncodedDocument(NamedTuple):
    """The tokens of a document.

    Attributes:
        document: it.
        parts: its ids, in several arrays.
        spans: (S, 2) begin and end of each span of tokens that are trained on; None for all tokens.
    """

    document: Document
    parts: "list[NDArray[Any]]"
    spans: "NDArray[np.int64] | None"

    @property
    def length(self) -> int:
        """T."""
        return sum(len(part) for part in self.parts)


class Unwritable(NamedTuple):
    """A document whose tokenizer cannot encode a control token inside a message as plain text."""

    document: Document


class DocumentEncoder:
    """Encodes documents to tokens.

    Args:
        vocabulary: the tokenizer.
        encoder: its engine.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._prefix = np.array(vocabulary.prefix, vocabulary.dtype)
        self._end = np.array([vocabulary.end_of_text], vocabulary.dtype)

    @functools.cached_property
    def _spans(self) -> TokenSpans:
        return TokenSpans(self._vocabulary.definition)

    @functools.cached_property
    def _literals(self) -> LiteralEncoder:
        return LiteralEncoder(self._vocabulary.definition, self._vocabulary.control_tokens)

    def encode(self, documents: Sequence[Document]) -> Iterator[EncodedDocument | Unwritable]:
        """Yield the tokens of each document; those not written by a template get beginning and end tokens."""
        for document, ids in zip(documents, self._ids(documents), strict=True):
            targets = None
            if document.literals:
                encoded = self._literals.encode(document.text, document.literals)
                if encoded is None:
                    yield Unwritable(document)
                    continue
                ids = encoded.ids.astype(self._vocabulary.dtype)
                if document.spans is not None:
                    targets = overlapping(encoded.bounds[:, 0], encoded.bounds[:, 1], document.spans)
            elif document.spans is not None:
                targets = self._spans.mask(document.text, ids, document.spans)
            yield self._framed(document, ids, targets)

    def _framed(self, document: Document, ids: "NDArray[Any]", targets: "NDArray[np.bool_] | None") -> EncodedDocument:
        """Return a document's tokens with beginning and end tokens; the end is trained on, the beginning is not."""
        parts = [ids]
        if not document.is_templated and document.begins and len(self._prefix):
            parts.insert(0, self._prefix)
            if targets is not None:
                targets = np.concatenate([np.zeros(len(self._prefix), np.bool_), targets])
        if document.needs_end or (not document.is_templated and document.ends):
            parts.append(self._end)
            if targets is not None:
                targets = np.append(targets, True)
        return EncodedDocument(document, parts, None if targets is None else _runs(targets))

    def _ids(self, documents: Sequence[Document]) -> "Iterator[NDArray[Any]]":
        """Yield each document's ids in the vocabulary's type, encoded in as few calls as possible."""
        begin = 0
        while begin < len(documents):
            special = documents[begin].is_templated
            end = begin + 1
            while end < len(documents) and documents[end].is_templated == special:
                end += 1
            texts = ["" if document.literals else document.text for document in documents[begin:end]]
            ids, offsets = self._encoder.encode(texts, special=special)
            stored = ids.astype(self._vocabulary.dtype)
            bounds = offsets.tolist()
            yield from (stored[bounds[i] : bounds[i + 1]] for i in range(len(bounds) - 1))
            begin = end


def _runs(targets: "NDArray[np.bool_]") -> "NDArray[np.int64]":
    """Return (S, 2) begin and end of each run of true values."""
    changes = np.flatnonzero(np.diff(targets, prepend=False, append=False))
    return changes.reshape(-1, 2).astype(np.int64)
