"""The texts that a tokenizer is trained on: of a large corpus a sample that hardly changes when it grows."""

import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from mlxflow.data.chat import CHATML, ChatTemplate
from mlxflow.data.formats import Document, Formatter
from mlxflow.data.records import Bad, Binary
from mlxflow.data.selection import is_held_out
from mlxflow.data.streams import FileProblem
from mlxflow.data.tokenization import SourceFile

_MOST_TOLD = 20


class Sample(NamedTuple):
    """Texts in the order of their hashes.

    Attributes:
        texts: each once.
        digests: of each.
        has_conversations: whether there are any in the corpus.
        problems: lines about what could not be read, the first of them.
    """

    texts: list[str]
    digests: list[bytes]
    has_conversations: bool
    problems: list[str]


def sample(
    files: Sequence[SourceFile],
    *,
    template: ChatTemplate | None,
    holdout: float,
    max_bytes: int,
    on_read: Callable[[int], None],
) -> Sample:
    """Return the training documents with the smallest hashes, as many as fit.

    A document that comes or goes changes the sample only if it is among them, so a large corpus that grows a little
    mostly keeps its tokenizer. A text of several megabytes is sampled by its pieces.

    Args:
        files: of the corpus; those of a validation or test side are passed over.
        template: of conversations; ChatML where there is none. Its control tokens are left out of the texts.
        holdout: share of documents held out.
        max_bytes: UTF-8 bytes that the texts may have together.
        on_read: called with each number of bytes read.
    """
    template = template or ChatTemplate(CHATML, {})
    markers = re.compile("|".join(re.escape(text) for text in template.markers()) or r"(?!)")
    heap: list[tuple[int, str]] = []  # the largest hash first
    known: set[bytes] = set()
    total, has_conversations, any_held_out = 0, False, False
    problems: list[str] = []
    for document in _documents(files, template, on_read, problems):
        has_conversations |= document.is_conversation
        digest = document.digest or xxhash.xxh3_128_digest(document.text.encode())
        if digest in known or not document.text or document.text.isspace():
            continue
        if document.digest and is_held_out(digest, holdout):
            any_held_out = True
            continue
        text = markers.sub("", document.text) if document.is_templated else document.text
        known.add(digest)
        heapq.heappush(heap, (-int.from_bytes(digest, "big"), text))
        total += document.num_bytes
        while total > max_bytes and len(heap) > 1:
            number, dropped = heapq.heappop(heap)
            total -= len(dropped.encode())
            known.discard((-number).to_bytes(16, "big"))
    chosen = sorted((-number, text) for number, text in heap)
    if holdout and not any_held_out and len(chosen) > 1:
        chosen = chosen[1:]  # the one that `selection.select` holds out
    return Sample(
        [text for _, text in chosen],
        [number.to_bytes(16, "big") for number, _ in chosen],
        has_conversations,
        problems,
    )


def _documents(
    files: Sequence[SourceFile], template: ChatTemplate, on_read: Callable[[int], None], problems: list[str]
) -> Iterator[Document]:
    for file in files:
        if file.side in ("validation", "test"):
            on_read(file.size)
            continue
        formatter = Formatter(
            format_=file.format_,  # type: ignore[arg-type]
            text_key=file.text_key,
            template=template,
            masks_prompts=False,
        )
        try:
            for items in file.items(formatter, on_read):
                for one in formatter.documents(items):
                    if not isinstance(one, Bad):
                        yield one
                    elif len(problems) < _MOST_TOLD:
                        problems.append(f"{file.name}:{one.place}: {one.reason}.")
        except FileProblem as problem:
            if len(problems) < _MOST_TOLD and not isinstance(problem, Binary):
                problems.append(f"{file.name}: {problem}.")
