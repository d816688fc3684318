"""The figures of a document source, and of the rows of a split, in the report of `pretokenize`."""

from mlxflow.storage.report_structs import Count, ReportTable


class DocumentLengths(ReportTable, frozen=True):
    """Quantiles of the number of tokens of a document; all None without documents.

    Attributes:
        smallest: of all documents.
        p05: 5 % are at most as long.
        p50: the median.
        p95: 95 % are at most as long.
        largest: of all documents.
    """

    smallest: Count | None = None
    p05: Count | None = None
    p50: Count | None = None
    p95: Count | None = None
    largest: Count | None = None


class SourceFigures(ReportTable, frozen=True, kw_only=True):
    """One entry of the sources: what was read and what was left out.

    Attributes:
        path: as the workflow names it.
        config: of a data set; empty for none.
        split: of a data set; empty for none.
        weight: how often an epoch shows each document.
        files: read.
        documents: read.
        train_documents: in the training split.
        validation_documents: in the validation split.
        test_documents: kept out of training.
        duplicates: left out.
        tokens: of all documents.
        text_bytes: of all documents, in UTF-8.
        bytes_per_token: text_bytes by tokens.
        tokens_per_document: quantiles.
        longer_than_a_row: documents.
        blank_documents: left out.
        masked_documents: left out because they have no token to learn.
        bad_records: that could not be read.
        binary_files: left out.
        empty_files: without a byte.
        hidden_files: left out.
        broken_links: left out.
        files_beside_records: left out because the folder has files of records.
    """

    path: str
    config: str
    split: str
    weight: float
    files: Count
    documents: Count
    train_documents: Count
    validation_documents: Count
    test_documents: Count
    duplicates: Count
    tokens: Count
    text_bytes: Count
    bytes_per_token: float
    tokens_per_document: DocumentLengths
    longer_than_a_row: Count
    blank_documents: Count
    masked_documents: Count
    bad_records: Count
    binary_files: Count
    empty_files: Count
    hidden_files: Count
    broken_links: Count
    files_beside_records: Count


class SideCounts(ReportTable, frozen=True, kw_only=True):
    """The documents of one split, training or validation, and the rows they were packed into.

    Attributes:
        documents: each once, however often an epoch shows it.
        conversations: how many of them are conversations.
        tokens: in the rows.
        targets: tokens that the model learns to predict.
        rows: in the token file.
        slots: tokens that the rows could hold.
        cut_documents: split over several rows.
        needlessly_cut: those of them that would fit into a row.
        truncated: conversations without their end.
        dropped: conversations left out because they are longer than a row.
        rows_without_targets: rows left out because none of their tokens is trained on.
    """

    documents: Count
    conversations: Count
    tokens: Count
    targets: Count
    rows: Count
    slots: Count
    cut_documents: Count
    needlessly_cut: Count
    truncated: Count
    dropped: Count
    rows_without_targets: Count
