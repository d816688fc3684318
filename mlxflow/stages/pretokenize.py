"""Tokenize the corpus once and keep it as memory-mapped token files."""

import os
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from mlxflow.errors import SourceError
from mlxflow.stage import Artifacts, Context, Corpus

VERSION = 1

#: Tokenizing is the processor's work: it may go on beside a stage that has the device.
USES_DEVICE = False


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pretokenize.tokenizer]` table."""

    vocab_size: Annotated[
        int, Meta(ge=257, le=1_000_000, description="ids of the byte-level BPE that is trained here")
    ] = 2048


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pretokenize]` table."""

    sources: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description='files, folders, globs of UTF-8 text or .jsonl, or "builtin:python-stdlib"'),
    ] = ("builtin:python-stdlib",)
    holdout: Annotated[float, Meta(gt=0, lt=1, description="share of documents kept for validation, by content")] = 0.02
    workers: Annotated[int, Meta(ge=1, le=256, description="threads that tokenize")] = 8
    context_length: Annotated[int, Meta(ge=2, le=1_048_576, description="positions the model sees")] = 64
    tokenizer: Annotated[TokenizerConfig, Meta(description="the tokenizer")] = TokenizerConfig()


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """The sources, in the order of the table."""

    sources: tuple[Path | Corpus, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Find the files that the sources name."""
        return cls(sources=artifacts.sources(config.sources, "sources"))


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files and the tokenizer in Hugging Face's form."""

    tokenizer: Path = Path("tokenizer.json")
    tokenizer_config: Path = Path("tokenizer_config.json")
    train: Path = Path("train.safetensors")
    validation: Path = Path("validation.safetensors")
    report: Path = Path("report.toml")


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Read the sources, train the tokenizer on the training documents, tokenize both sides.

    Raises:
        SourceError: a source cannot be read, or the corpus has not one row for each side.
    """
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # read by the tokenizers library when it is imported
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from mlxflow.data import documents, tokenizer

    corpora = [source.name for source in inputs.sources if isinstance(source, Corpus)]
    texts, skipped_files = documents.read_builtins(corpora)
    texts += documents.read_files(source for source in inputs.sources if isinstance(source, Path))
    split = documents.split_documents(texts, holdout=config.holdout)
    if not split.train:
        raise SourceError("pretokenize.sources: hold no text. Name a file, a folder or a glob with text in it.")
    trained = tokenizer.train_tokenizer(split.train, vocab_size=config.tokenizer.vocab_size)
    tokenizer.save_tokenizer(
        trained,
        tokenizer_file=outputs.tokenizer,
        config_file=outputs.tokenizer_config,
        context_length=config.context_length,
    )
    report: dict[str, Any] = {
        "vocab_size": trained.get_vocab_size(),
        "context_length": config.context_length,
        "duplicates": split.duplicates,
        "skipped_files": skipped_files,
    }
    for side, path, side_texts in (
        ("train", outputs.train, split.train),
        ("validation", outputs.validation, split.validation),
    ):
        report[side] = _write_side(side, path, side_texts, trained, config, context)
    return report


def _write_side(
    side: str, path: Path, texts: list[str], trained: Any, config: Config, context: Context
) -> dict[str, Any]:
    from mlxflow import artifact
    from mlxflow.data import tokenizer

    tokens, offsets = tokenizer.encode_documents(trained, texts)
    if len(tokens) <= config.context_length:
        raise SourceError(
            f"pretokenize.sources: the {side} documents have {len(tokens):,} tokens, one row of "
            f"pretokenize.context_length = {config.context_length} needs {config.context_length + 1:,}. "
            "Add text, or lower the context length"
            + (" or raise pretokenize.holdout." if side == "validation" else ".")
        )
    metadata = {
        "context_length": str(config.context_length),
        "vocab_size": str(trained.get_vocab_size()),
        "end_of_text": str(trained.token_to_id(tokenizer.END_OF_TEXT)),
    }
    artifact.write_arrays(
        path,
        {"tokens": tokens, "document_offsets": offsets},
        metadata | artifact.provenance_metadata(context.provenance),
    )
    text_bytes = sum(len(text.encode()) for text in texts)
    return {
        "documents": len(texts),
        "tokens": len(tokens),
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / len(tokens), 4),
    }
