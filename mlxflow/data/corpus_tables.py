"""The workflow tables of a corpus's sources and tokenizer; imports no MLX."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.data.sources import HF
from mlxflow.data.split_slices import parse_slices
from mlxflow.storage.toml_tables import Problem

Format = Literal["auto", "text", "chat", "completions"]


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of `pretokenize.sources` written as a table."""

    path: Annotated[str, Meta(description="a source, as in an entry that is text")]
    weight: Annotated[float, Meta(gt=0, le=1000, description="how often an epoch repeats its documents")] = 1.0
    format: Annotated[Format, Meta(description="kind of its records; auto: pretokenize.format")] = "auto"
    text_key: Annotated[str, Meta(description="key of the text in a record; empty: pretokenize.text_key")] = ""
    config: Annotated[str, Meta(description="of hf: the configuration; empty: the only one")] = ""
    split: Annotated[
        str,
        Meta(description='of hf: splits and slices, such as "train[:1%]"; empty: all, each on the side in its name'),
    ] = ""

    def problems(self) -> Iterator[Problem]:
        """Yield invalid splits and slices, and data set keys of a source that is no data set."""
        for key in ("config", "split"):
            if (value := getattr(self, key)) and not self.path.startswith(HF):
                yield Problem(key, value, "is for a data set, and path names none", f'Write path = "{HF}...".')
                return
        try:
            parse_slices(self.split or "all")
        except ValueError as error:
            yield Problem("split", self.split, str(error), "Change it or remove the key.")


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[pretokenize.tokenizer]` table."""

    from_: Annotated[
        str,
        Meta(
            description="a folder with a tokenizer.json, a hub id or a stage; "
            "empty: that of train.model.from, else a new one"
        ),
    ] = msgspec.field(default="", name="from")
    trust_remote_code: Annotated[bool, Meta(description="whether Python code of the folder may run; read it first")] = (
        False
    )
    add_tokens: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="control tokens added to the vocabulary, besides those of a chat_template that is named"),
    ] = ()
    vocab_size: Annotated[
        int, Meta(ge=257, le=1_000_000, description="vocabulary size of the byte-level BPE that is trained here")
    ] = 2048
    max_training_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=10**12,
            description="of a larger corpus, a sample of this size trains the tokenizer, in 2 to 5 times that memory; "
            "in 60 times that where nearly all words differ",
        ),
    ] = 50_000_000

    def problems(self) -> Iterator[Problem]:
        """Yield a vocabulary size that is set for an existing tokenizer."""
        if self.from_ and self.vocab_size != 2048:
            expected = "is for a tokenizer trained here, and tokenizer.from names one that exists"
            yield Problem("vocab_size", self.vocab_size, expected, "Remove one of the two.")
