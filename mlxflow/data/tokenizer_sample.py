"""The training texts of a tokenizer: for a large corpus a sample that rarely changes when the corpus grows."""

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from mlxflow.data.chat import ChatTemplate, markers
from mlxflow.data.chatml import CHATML
from mlxflow.data.decompression import FileProblem
from mlxflow.data.document_selection import is_held_out
from mlxflow.data.documents import Document, Formatter
from mlxflow.data.records import Bad
from mlxflow.data.shard_builder import SourceFile

# Each text takes about 300 bytes besides its own.
_MAX_TEXTS = 1 << 21


class TokenizerSample(NamedTuple):
    """Texts in the order of their hashes.

    Attributes:
        texts: each once, in UTF-8, which takes less memory than `str`.
        digests: of each text.
        has_conversations: whether the corpus contains conversations.
    """

    texts: list[bytes]
    digests: list[bytes]
    has_conversations: bool

    def decoded(self) -> Iterator[str]:
        """Yield the texts."""
        return (text.decode() for text in self.texts)

    def taken(self) -> Iterator[str]:
        """Yield the texts and drop each one, so that yielded texts take no memory."""
        self.texts.reverse()
        while self.texts:
            yield self.texts.pop().decode()


def sample(
    files: Sequence[SourceFile],
    *,
    template: ChatTemplate | None,
    holdout: float,
    max_bytes: int,
    on_read: Callable[[int], None],
) -> TokenizerSample:
    """Return the training documents with the smallest hashes, as many as fit into the given size.

    An added or removed document changes the sample only if it is among them, so a large corpus that grows a little
    usually keeps its tokenizer. A text of several megabytes is sampled by its pieces. Unreadable records are skipped.

    Args:
        files: of the corpus; those for validation or test are skipped.
        template: of conversations; ChatML if there is none. Its control tokens are left out of the texts.
        holdout: share of documents held out.
        max_bytes: maximum total size of the texts in UTF-8.
        on_read: called with the number of bytes of each read.
    """
    template = template or ChatTemplate(CHATML, {})
    sampled, any_held_out = _sample(files, template, holdout, max_bytes, on_read)
    if any_held_out and not sampled.texts:  # `document_selection.select` never holds out all documents
        sampled, any_held_out = _sample(files, template, 0.0, max_bytes, lambda _: None)
    if holdout and not any_held_out and len(sampled.texts) > 1:  # it holds out the first one
        return sampled._replace(texts=sampled.texts[1:], digests=sampled.digests[1:])
    return sampled


def _sample(
    files: Sequence[SourceFile],
    template: ChatTemplate,
    holdout: float,
    max_bytes: int,
    on_read: Callable[[int], None],
) -> tuple[TokenizerSample, bool]:
    """Return the sample of the documents not held out by their hashes, and whether any is held out."""
    control_tokens = re.compile("|".join(map(re.escape, markers(template.source))) or r"(?!)")
    chosen = _SmallestHashes(max_bytes)
    has_conversations, any_held_out = False, False
    for document in _documents(files, template, on_read):
        has_conversations |= document.is_conversation
        digest = document.digest or xxhash.xxh3_128_digest(document.text.encode())
        if digest in chosen.digests or not document.text or document.text.isspace():
            continue
        if document.digest and is_held_out(digest, holdout):
            any_held_out = True
            continue
        text = control_tokens.sub("", document.text) if document.is_templated else document.text
        chosen.add(digest, text.encode(), document.num_bytes)
    return TokenizerSample(*chosen.sorted(), has_conversations), any_held_out


class _SmallestHashes:
    """Collects the texts with the smallest hashes, in UTF-8, up to a total size.

    Args:
        max_bytes: maximum total size in UTF-8; one text always fits.

    Attributes:
        digests: of the texts.
    """

    def __init__(self, max_bytes: int) -> None:
        self.digests: set[bytes] = set()
        self._max_bytes = max_bytes
        self._total = 0
        self._heap: list[tuple[int, bytes]] = []  # the largest hash first

    def add(self, digest: bytes, text: bytes, num_bytes: int) -> None:
        self.digests.add(digest)
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), text))
        self._total += num_bytes
        while (self._total > self._max_bytes or len(self._heap) > _MAX_TEXTS) and len(self._heap) > 1:
            number, dropped = heapq.heappop(self._heap)
            self._total -= len(dropped)
            self.digests.discard((-number).to_bytes(16, "big"))

    def sorted(self) -> tuple[list[bytes], list[bytes]]:
        """Return the texts and their digests, the smallest first."""
        pairs = sorted((-number, text) for number, text in self._heap)
        return [text for _, text in pairs], [number.to_bytes(16, "big") for number, _ in pairs]


def _documents(
    files: Sequence[SourceFile], template: ChatTemplate, on_read: Callable[[int], None]
) -> Iterator[Document]:
    for file in files:
        if file.side in ("validation", "test"):
            on_read(file.size)
            continue
        formatter = Formatter(
            format_=file.format_,  # type: ignore[arg-type]
            text_key=file.text_key,
            template=template,
            train_on=None,
            name=file.name,
        )
        try:
            for items in file.items(formatter, on_read):
                yield from (one for one in formatter.documents(items) if not isinstance(one, Bad))
        except FileProblem:
            continue
