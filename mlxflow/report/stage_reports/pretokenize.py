"""The figures of a pretokenize stage in report.toml."""

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import msgspec

from mlxflow.data.corpus_figures import SideCounts, SourceFigures
from mlxflow.storage.report_structs import Count, ReportTable, Share, StageReport

if TYPE_CHECKING:
    from mlxflow.data.corpus_report import CorpusContents
    from mlxflow.data.end_tokens import Endings
    from mlxflow.data.shard_builder import Tokenized


class SideFigures(SideCounts, frozen=True, kw_only=True):
    """The figures of one split.

    Attributes:
        real_token_share: share of the slots that are filled, to six digits.
    """

    real_token_share: Share

    @classmethod
    def of(cls, counts: SideCounts) -> Self:
        """Return the figures of one split.

        Args:
            counts: of the documents and rows.
        """
        share = round(counts.tokens / max(1, counts.slots), 6)
        return cls(**msgspec.structs.asdict(counts), real_token_share=share)


class PretokenizeRun(ReportTable, frozen=True, kw_only=True):
    """The stage's own keys of the table `run`.

    Attributes:
        tokenized_files: tokenized by this run.
        kept_files: whose tokens were cached by an earlier run.
        engine: the encoder.
        peak_rss_bytes: highest resident memory of the process that did the work.
    """

    tokenized_files: Count
    kept_files: Count
    engine: str
    peak_rss_bytes: Count

    @classmethod
    def of(cls, tokenized: "Tokenized", engine: str) -> Self:
        """Return the keys of a run in this process.

        Args:
            tokenized: the shards of its files.
            engine: name of the encoder.
        """
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return cls(
            tokenized_files=tokenized.num_tokenized,
            kept_files=len(set(tokenized.keys)) - tokenized.num_tokenized,
            engine=engine,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes,
        )


class PretokenizeReport(StageReport, frozen=True, kw_only=True):
    """The figures of a pretokenize stage.

    Attributes:
        vocab_size: number of ids of the tokenizer.
        context_length: positions of a row; a row has one token more.
        packing: the packing method.
        warnings: about the splits, one sentence each.
        end_tokens: texts of the tokens after which generation stops.
        added_ends: conversations whose template ends with none of them.
        conversations_with_control_tokens: whose messages contain a control token.
        train: the training split.
        validation: the validation split.
        duplicates: documents left out.
        test_documents: documents kept out of training by the name of their file or split.
        masked_documents: documents left out because none of their tokens is trained on.
        validation_files: names of the first files that are held out by name.
        test_files: the same of test files.
        sources: the entries of the workflow.
        bad_records: the first records that could not be read: file, line and reason.
        run: the stage's own keys.
    """

    vocab_size: Count
    context_length: Count
    packing: str
    warnings: tuple[str, ...]
    end_tokens: tuple[str, ...]
    added_ends: Count
    conversations_with_control_tokens: Count
    train: SideFigures
    validation: SideFigures
    duplicates: Count
    test_documents: Count
    masked_documents: Count
    validation_files: tuple[str, ...]
    test_files: tuple[str, ...]
    sources: tuple[SourceFigures, ...]
    bad_records: tuple[str, ...]
    run: PretokenizeRun

    @classmethod
    def of(
        cls,
        contents: "CorpusContents",
        counts: Mapping[str, SideCounts],
        ends: "Endings",
        *,
        vocab_size: int,
        context_length: int,
        packing: str,
        warnings: Sequence[str],
        run: PretokenizeRun,
    ) -> Self:
        """Return the figures of a corpus.

        Args:
            contents: the corpus.
            counts: of the documents and rows of each split, "train" and "validation".
            ends: how its conversations end.
            vocab_size: ids of the tokenizer.
            context_length: positions of a row.
            packing: the packing method.
            warnings: about the splits.
            run: facts that may differ between two equal runs.
        """
        from mlxflow.data import corpus_report
        from mlxflow.data.document_selection import DUPLICATE, TEST

        capacity = context_length + 1
        return cls(
            vocab_size=vocab_size,
            context_length=context_length,
            packing=packing,
            warnings=tuple(warnings),
            end_tokens=tuple(ends.texts),
            added_ends=ends.added,
            conversations_with_control_tokens=ends.with_control_tokens,
            train=SideFigures.of(counts["train"]),
            validation=SideFigures.of(counts["validation"]),
            duplicates=contents.count(DUPLICATE),
            test_documents=contents.count(TEST),
            masked_documents=sum(shard.masked for shard in contents.shards),
            validation_files=tuple(corpus_report.first_names(contents, "validation")),
            test_files=tuple(corpus_report.first_names(contents, "test")),
            sources=tuple(
                corpus_report.account(contents, number, capacity=capacity) for number in range(len(contents.settings))
            ),
            bad_records=tuple(corpus_report.bad_records(contents)),
            run=run,
        )
