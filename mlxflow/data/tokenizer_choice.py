"""Choose the tokenizer of a corpus: an existing one, or a byte-level BPE trained on its documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlxflow.data import chat, tokenizer, tokenizer_folder, tokenizer_sample
from mlxflow.data.chatml import CHATML
from mlxflow.data.corpus_names import CorpusNames
from mlxflow.data.corpus_tables import TokenizerConfig
from mlxflow.data.long_words import MAX_WORD_LENGTH, has_long_word
from mlxflow.data.named_templates import NAMED_TEMPLATES
from mlxflow.data.progress import show_activity, show_progress
from mlxflow.data.shard_builder import SourceFile
from mlxflow.data.tokenizer import Vocabulary
from mlxflow.device import heap
from mlxflow.models import gguf_reading
from mlxflow.storage import remote_code
from mlxflow.storage.atomic_folders import write_whole
from mlxflow.storage.digests import digest_json
from mlxflow.storage.regular_files import read_regular
from mlxflow.storage.temporary_files import scratch_folder


class TokenizerRequest(NamedTuple):
    """The requested tokenizer.

    Attributes:
        table: the workflow's table.
        files: of an existing tokenizer; empty for one on the hub or a new one.
        template_file: a Jinja file with the chat template; None for the tokenizer's own.
        template_name: the chat template by name, see `NAMED_TEMPLATES`; empty for none.
        template_key: the setting that names template or file, for messages.
        names: of the settings, for messages.
        version: of the stage; a tokenizer trained by another version is not reused.
    """

    table: TokenizerConfig
    files: tuple[Path, ...]
    template_file: Path | None
    template_name: str
    template_key: str
    names: CorpusNames
    version: int


def choose_vocabulary(
    request: TokenizerRequest, files: Sequence[SourceFile], *, holdout: float, context_length: int, cache_folder: Path
) -> Vocabulary:
    """Return the requested tokenizer, opened or trained.

    Args:
        request: the requested tokenizer.
        files: of the corpus, in its order.
        holdout: share of the documents that a new tokenizer is not trained on.
        context_length: of the rows, stored in a new tokenizer's configuration.
        cache_folder: the folder of cached tokenizers.

    Raises:
        SourceError: the tokenizer or the chat template cannot be used.
    """
    named = NAMED_TEMPLATES.get(request.template_name)
    template = request.template_file.read_text(encoding="utf-8") if request.template_file else named and named[0]
    name, key = request.table.from_, request.names.of("tokenizer.from")
    if not name:
        return _trained(
            request, files, template, holdout=holdout, context_length=context_length, cache_folder=cache_folder
        )
    with remote_code.trusting_code(request.table.trust_remote_code), scratch_folder() as scratch:
        files_found = gguf_reading.tokenizer_files(request.files, key=f'{key} = "{name}"')
        folder = files_found[0].parent if files_found else Path()
        tokenizer_files = {path.relative_to(folder).as_posix(): path for path in files_found}
        tokenizer_files = tokenizer_files or tokenizer_folder.hub_files(name, key)
        trust_key = request.names.of("tokenizer.trust_remote_code")
        tokenizer_files = tokenizer_folder.converted(tokenizer_files, scratch, name, key=key, trust_key=trust_key)
        return tokenizer.open_vocabulary(
            tokenizer_files,
            template=template,
            name=name,
            key=key,
            template_key=request.template_key,
            additions=_additions(request),
        )


def _additions(request: TokenizerRequest) -> tokenizer.Additions:
    """Return what is added to an existing tokenizer: the tokens of the table, and those of a named template."""
    template, turn_end = NAMED_TEMPLATES.get(request.template_name, ("", ""))
    return tokenizer.Additions((*chat.markers(template), *request.table.add_tokens), turn_end)


def _trained(
    request: TokenizerRequest,
    files: Sequence[SourceFile],
    template: str | None,
    *,
    holdout: float,
    context_length: int,
    cache_folder: Path,
) -> Vocabulary:
    """Return a tokenizer trained on the training documents or on a sample of them, cached if possible."""
    table = request.table
    compiled = tokenizer.compile_template(template, request.template_key) if template else None
    with show_progress("reading", sum(file.size for file in files)) as (progress, watch):

        def on_read(count: int) -> None:
            progress.count(read_bytes=count)
            watch()

        sample = tokenizer_sample.sample(
            files, template=compiled, holdout=holdout, max_bytes=table.max_training_bytes, on_read=on_read
        )
    template = CHATML if template is None and sample.has_conversations else template
    special = list(dict.fromkeys([*(chat.markers(template) if template else ()), *table.add_tokens]))
    cut = [MAX_WORD_LENGTH] if any(map(has_long_word, sample.decoded())) else []
    key = digest_json([request.version, table.vocab_size, special, [digest.hex() for digest in sample.digests], *cut])
    file = cache_folder / f"{key}.tokenizer.json"
    if not file.exists():
        with show_activity(f"training a tokenizer of {table.vocab_size:,} tokens"):
            definition = tokenizer.train_tokenizer(sample.taken(), vocab_size=table.vocab_size, special_tokens=special)
        write_whole(file, definition.to_str().encode())
        heap.trim()
    return tokenizer.trained_vocabulary(
        read_regular(file).decode(),
        context_length=context_length,
        template=template,
        template_key=request.template_key,
    )
