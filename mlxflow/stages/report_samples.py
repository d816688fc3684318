"""What the models write for the page: held-out questions answered, or the beginnings of documents continued."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxflow.errors import reason_of
from mlxflow.workflow.stage import Context, derive_seed

if TYPE_CHECKING:
    from mlxflow.stage_reports.report import SampleText

_TEXT_TEMPERATURE = 0.8


class _Asked(NamedTuple):
    """What every model is asked.

    Attributes:
        texts: to be continued; to be answered by models with a chat template where a user wrote them.
        questions: of held-out conversations.
        tokenizer: of the tokens of the questions; None without any.
        are_messages: whether the texts are for the chat template of a model that has one.
    """

    texts: list[str]
    questions: list[Any]
    tokenizer: Any
    are_messages: bool


class _Texts(NamedTuple):
    """What a model wrote, and after what; see `SampleText`."""

    text: str
    prompt: str | None = None
    question: str | None = None
    answer: str | None = None


def samples(config: Any, inputs: Any, context: Context) -> list["SampleText"]:
    """Return what every model writes after every prompt; the same models write the same.

    Args:
        config: the `[report]` table.
        inputs: of the stage.
        context: of the stage.

    Raises:
        ArtifactError: a model cannot be opened.
    """
    from mlxflow.report.load_run import model_key
    from mlxflow.stage_reports.report import SampleText
    from mlxflow.storage import report_structs

    asked = _asked(config, inputs)
    found: list[SampleText] = []
    for reference, path in inputs.models.items():
        key = model_key(report_structs.read_provenance(inputs.reports[reference], advice=f"Run: doit {reference}"))
        try:
            made = _written(config, path.parent, asked, context)
        except RuntimeError as error:  # no room for the model: the page is drawn without it
            found.append(SampleText(model=reference, model_key=key, error=reason_of(error, None)))
            continue
        found += [SampleText(model=reference, model_key=key, **texts._asdict()) for texts in made]
    return found


def _asked(config: Any, inputs: Any) -> _Asked:
    if config.prompts or not inputs.models:
        return _Asked(list(config.prompts), [], None, are_messages=True)
    from mlxflow.data.guarded_tokenizer import GuardedTokenizer
    from mlxflow.data.held_out_questions import held_out_beginnings, held_out_questions
    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.text_generation import open_template

    tokens = TokenFile.open(inputs.validation[0])
    tokenizer = GuardedTokenizer(inputs.validation[1].parent)
    if tokens.has_conversations:
        template = open_template(inputs.validation[1].parent, tokenizer.call)
        questions = held_out_questions(tokens, tokenizer, template, count=config.num_prompts)
        if questions:
            return _Asked([], questions, tokenizer, are_messages=False)
    texts = held_out_beginnings(tokens, tokenizer, count=config.num_prompts, num_tokens=config.prompt_tokens)
    return _Asked(texts, [], None, are_messages=False)


def _written(config: Any, folder: Path, asked: _Asked, context: Context) -> list[_Texts]:
    """Return what one model writes; an entry with a question is an answer, one without continues its prompt."""
    from mlxflow.evaluation.text_generation import Sampling, Writer

    writer = Writer(folder)
    is_chat = asked.are_messages and writer.has_template
    likeliest = bool(asked.questions) or is_chat
    temperature = config.temperature if config.temperature != "auto" else 0.0 if likeliest else _TEXT_TEMPERATURE
    sampling = Sampling(config.max_tokens, temperature, derive_seed(context.seed, "report.samples"))
    found: list[_Texts] = []
    for text in asked.texts:
        ids = writer.chat_ids([{"role": "user", "content": text}]) if is_chat else writer.text_ids(text)
        written = "".join(writer.write(ids, sampling))
        found.append(_Texts(written, question=text) if is_chat else _Texts(written, prompt=text))
    if asked.questions:
        reads_ids = writer.tokenizer.digest_vocabulary() == asked.tokenizer.digest_vocabulary()
        for one in asked.questions:
            ids = one.ids if reads_ids else _ids_of_another(writer, one.text)
            found.append(_Texts("".join(writer.write(ids, sampling)), question=one.text, answer=one.answer))
    return found


def _ids_of_another(writer: Any, text: str) -> list[int]:
    """Return the ids of a question for a model of another tokenizer than the one that made the tokens."""
    ids: list[int] = writer.text_ids(text)
    if writer.has_template:
        ids = writer.chat_ids([{"role": "user", "content": text}])
    return ids
