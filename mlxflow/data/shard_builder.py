"""Build the missing shards: each file is read, parsed and tokenized by one of several workers."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from mlxflow.data.corpus_names import CorpusNames
from mlxflow.data.decompression import THE_SOURCES, FileProblem
from mlxflow.data.document_encoder import DocumentEncoder, Unwritable
from mlxflow.data.documents import Document, Formatter, NoTemplateError, TrainOn
from mlxflow.data.encoder import Encoder
from mlxflow.data.items import LONG_TEXT_BYTES
from mlxflow.data.records import Bad, Binary, PlainText, Record, Shape, read_file
from mlxflow.data.shard import CONVERSATION, FORMAT, MASKED, Shard, ShardWriter
from mlxflow.data.shard_cache import ShardStore
from mlxflow.data.tokenizer import Vocabulary
from mlxflow.data.watched import Work
from mlxflow.messages.errors import SourceError
from mlxflow.storage.digests import digest_json
from mlxflow.storage.paths import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray


T = TypeVar("T")

# Files from this size on are read and parsed in one thread and tokenized in another.
_LARGE_BYTES = 1 << 23


class SourceFile(NamedTuple):
    """One file of a source, or some rows of a data set.

    Attributes:
        name: as the user would write it.
        path: its path.
        shape: how it is read.
        digest: of its content.
        size: in bytes.
        source: the number of its source.
        side: "train", "validation" or "test" from its name; else "".
        is_named: the source names this file itself, so it must be text.
        format_: form of its records.
        text_key: the key of the text.
        read: yields its records if it is no file.
        is_unchanged: whether it is unchanged since its digest was computed.
        key: the setting that names its source, for messages.
    """

    name: str
    path: Path
    shape: Shape
    digest: str
    size: int
    source: int
    side: str
    is_named: bool
    format_: str
    text_key: str
    read: Callable[[], Iterator[list[Any]]] | None = None
    is_unchanged: Callable[[], bool] = lambda: True
    key: str = THE_SOURCES

    def items(self, formatter: Formatter, on_read: Callable[[int], None]) -> "Iterator[list[Record | PlainText | Bad]]":
        """Yield the file's records; see `records.read_file`."""
        if self.read is not None:
            yield from self.read()
            on_read(self.size)
            return
        try:
            yield from read_file(
                self.path,
                self.shape,
                expected_digest=self.digest,
                form=formatter.record_form,
                strict=self.format_ != "auto",
                on_read=on_read,
                source=self.key,
            )
        except FileProblem as problem:  # a reader that stops midway has not compared the digest
            if self.is_unchanged():
                raise
            raise SourceError(
                f"{printable(str(self.path))}: changed while it was read. Run the stage again."
            ) from problem


class Progress:
    """Progress of all workers.

    Attributes:
        read_bytes: of files, as stored on the disk.
        documents: tokenized so far.
        tokens: so far.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.read_bytes = self.documents = self.tokens = 0

    def count(self, *, read_bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        """Add to the counts."""
        with self._lock:
            self.read_bytes += read_bytes
            self.documents += documents
            self.tokens += tokens


class Tokenized(NamedTuple):
    """The shards of files, in their order, and the number of newly tokenized files."""

    keys: list[str]
    num_tokenized: int


class Tokenizing:
    """Tokenizes files to shards.

    Args:
        vocabulary: the tokenizer.
        encoder: its engine.
        train_on: the parts of conversations that are trained on.
        store: the cache of shards.
        workers: number of files tokenized at a time.
        names: of the settings, for messages.
    """

    def __init__(
        self,
        *,
        vocabulary: Vocabulary,
        encoder: Encoder,
        train_on: TrainOn,
        store: ShardStore,
        workers: int,
        names: CorpusNames,
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = DocumentEncoder(vocabulary, encoder)
        self._train_on: TrainOn = train_on
        self._store = store
        self._workers = workers
        self._setting_names = names
        template = vocabulary.template.source if vocabulary.template else None
        special = {k: v for k, v in vocabulary.config.items() if k.endswith("_token")}
        self._settings = [FORMAT, vocabulary.identity, template, special if template else None, train_on]
        self._stopped = Event()

    def key(self, file: SourceFile) -> str:
        """Return the name of a file's shard: the digest of everything that its tokens depend on."""
        return digest_json([self._settings, file.digest, file.shape, file.format_, file.text_key])

    def run(self, files: Sequence[SourceFile], progress: Progress, watch: Callable[[], None]) -> Tokenized:
        """Build the missing shards of files.

        Args:
            files: in the order of the corpus.
            progress: updated by the workers.
            watch: called repeatedly meanwhile.

        Raises:
            SourceError: a file changed, vanished or cannot be read.
        """
        keys = [self.key(file) for file in files]
        first = dict(reversed(list(zip(keys, files, strict=True))))
        with ThreadPoolExecutor(self._workers, "tokenize") as pool:
            try:
                futures = [pool.submit(self._ensure, key, file, progress) for key, file in first.items()]
                _wait_for(futures, watch)
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return Tokenized(keys, sum(future.result() for future in futures))

    def _ensure(self, key: str, file: SourceFile, progress: Progress) -> bool:
        """Build a file's shard if it is missing; return whether it was missing."""
        shard = self._store.find(key)
        if shard is not None:
            progress.count(read_bytes=file.size, documents=shard.num_documents, tokens=shard.num_tokens)
            return False
        try:
            with self._store.write(key, self._vocabulary.dtype) as writer:
                self._tokenize(file, writer, progress)
        except NoTemplateError as error:
            raise SourceError(
                f"{file.name}: holds conversations, and the tokenizer has no chat template. "
                f'Set {self._setting_names.of("chat_template")} = "FILE.jinja".'
            ) from error
        except FileProblem as problem:
            with self._store.write(key, self._vocabulary.dtype) as writer:
                writer.summary.problem, writer.summary.is_binary = str(problem), isinstance(problem, Binary)
                writer.summary.num_bad = 0 if writer.summary.is_binary else 1
        except Exception as error:
            error.add_note(f"while {file.name} was tokenized")
            raise
        return True

    def _tokenize(self, file: SourceFile, writer: ShardWriter, progress: Progress) -> None:
        formatter = Formatter(
            format_=file.format_,  # type: ignore[arg-type]  # checked by the stage's Config
            text_key=file.text_key,
            template=self._vocabulary.template,
            train_on=self._train_on,
            name=file.name,
        )
        long = _LongDocument()
        batches = file.items(formatter, lambda count: progress.count(read_bytes=count))
        for items in ahead(batches) if file.size > _LARGE_BYTES else batches:
            if self._stopped.is_set():
                raise InterruptedError
            for documents in self._documents(formatter, items, writer):
                size, own = sum(document.num_bytes for document in documents), len(self._vocabulary.definition)
                with Work(self._vocabulary.subject, file.name, size, own=own) as work:
                    self._encode(documents, writer, long, progress, work)
            del items  # a batch may be one record of many megabytes, and the next one is being read
        writer.summary.end_tokens = sorted({*writer.summary.end_tokens, *self._ids_of(formatter.end_tokens)})
        writer.summary.inner_tokens = self._ids_of(formatter.inner_tokens)

    @staticmethod
    def _documents(
        formatter: Formatter, items: Sequence[Record | PlainText | Bad], writer: ShardWriter
    ) -> Iterator[list[Document]]:
        """Yield the documents of a batch in groups for one call of the tokenizer; bad records go to the writer."""
        documents: list[Document] = []
        size = 0
        for document in formatter.documents(items):
            if isinstance(document, Bad):
                writer.refuse(*document)
            elif document.begins and document.ends and (not document.text or document.text.isspace()):
                writer.summary.blank += 1
            else:
                documents.append(document)
                size += document.num_bytes
                if size > LONG_TEXT_BYTES:
                    yield documents
                    documents, size = [], 0
        if documents:
            yield documents

    def _ids_of(self, texts: set[str]) -> list[int]:
        ids = self._vocabulary.token_ids if texts else {}
        return sorted(ids[text] for text in texts)

    def _encode(
        self, documents: list[Document], writer: ShardWriter, long: "_LongDocument", progress: Progress, work: Work
    ) -> None:
        pieces: list[NDArray[Any]] = [np.zeros(0, self._vocabulary.dtype)]
        finished: list[_Finished] = []
        for encoded in self._encoder.encode(documents):
            document = encoded.document
            work.step(document.place)
            if isinstance(encoded, Unwritable):
                writer.refuse(
                    document.place, "holds a control token that its tokenizer cannot write as text. Fix the record"
                )
                continue
            if encoded.spans is not None and not len(encoded.spans):
                writer.summary.masked += 1
                continue
            if document.needs_end or not document.is_templated:
                writer.summary.end_tokens = [self._vocabulary.end_of_text]
            writer.summary.added_ends += document.needs_end
            writer.summary.literals += bool(document.literals)
            pieces += encoded.parts
            done = long.add(document, encoded.length, encoded.spans)
            if done is not None:
                finished.append(done)
        writer.append(tokens=np.concatenate(pieces))
        _append_documents(writer, finished)
        progress.count(documents=len(finished), tokens=sum(one.length for one in finished))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items, each computed in another thread while the previous one is in use."""
    end = object()
    with ThreadPoolExecutor(1, "read") as pool:
        try:
            coming = pool.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = pool.submit(next, items, end)
                yield cast("T", item)
        finally:
            pool.shutdown()
            if isinstance(items, Generator):
                items.close()


class _Finished(NamedTuple):
    """The table entry of a tokenized document."""

    length: int
    digest: bytes
    size: int
    place: int
    flags: int
    spans: "NDArray[np.int64] | None"


class _LongDocument:
    """Accumulates the pieces of a document until the last one."""

    def __init__(self) -> None:
        self._length = self._size = 0

    def add(self, document: Document, length: int, spans: "NDArray[np.int64] | None") -> _Finished | None:
        self._length += length
        self._size += document.num_bytes
        if not document.ends:
            return None
        flags = CONVERSATION * document.is_conversation + MASKED * (spans is not None)
        finished = _Finished(self._length, document.digest, self._size, document.place, flags, spans)
        self._length = self._size = 0
        return finished


def _append_documents(writer: ShardWriter, finished: list[_Finished]) -> None:
    """Append documents to the table; see `shard.Documents`."""
    hashes = np.frombuffer(b"".join(one.digest for one in finished), ">u8").reshape(-1, 2)
    rows = [(one.length, 0, 0, one.size, one.place, one.flags, _count(one.spans)) for one in finished]
    table = np.array(rows, np.uint64).reshape(-1, 7)
    table[:, 1:3] = hashes
    spans = [one.spans for one in finished if one.spans is not None]
    writer.append(documents=table, spans=np.concatenate(spans) if spans else np.zeros((0, 2), np.int64))


def _count(spans: "NDArray[np.int64] | None") -> int:
    return 0 if spans is None else len(spans)


def _wait_for(futures: Sequence[Future[bool]], watch: Callable[[], None]) -> None:
    """Wait until all are done, or raise the first failure."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
        watch()
        failed = [future for future in futures if future in done and future.exception() is not None]
        if failed:
            failed[0].result()


def open_shards(store: ShardStore, keys: Sequence[str]) -> list[Shard]:
    """Return shards in the order of their keys."""
    opened = {key: store.open(key) for key in set(keys)}
    return [opened[key] for key in keys]
