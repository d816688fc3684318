"""The figures of the report stage, as its report.toml holds them: the texts that models wrote for the page."""

from mlxflow.storage.report_structs import Count, ReportTable, StageReport


class SampleText(ReportTable, frozen=True, kw_only=True):
    """What a model wrote; without a text, `error` says why.

    Attributes:
        model: the stage that made it, such as "quantize:q4".
        model_key: digests of what the model was made from.
        prompt: text that was continued; None for a question.
        question: that was answered; None for a prompt.
        answer: in the held-out conversation; None where a user wrote the question.
        text: that the model wrote.
        error: why it wrote none; None where it did.
    """

    model: str
    model_key: str
    prompt: str | None = None
    question: str | None = None
    answer: str | None = None
    text: str | None = None
    error: str | None = None


class PageReport(StageReport, frozen=True, kw_only=True):
    """The figures of the report stage.

    Attributes:
        page_bytes: size of the page.
        samples: what the models wrote.
    """

    page_bytes: Count
    samples: tuple[SampleText, ...]
