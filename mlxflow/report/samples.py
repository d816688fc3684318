"""Generate samples for the page: answers to held-out questions, or continuations of held-out documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.data.held_out_questions import held_out_beginnings, held_out_questions
from mlxflow.data.token_file import TokenFile
from mlxflow.evaluation.text_generation import Sampling, Writer, open_template
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import CallError, reason_of
from mlxflow.report.load_run import model_key
from mlxflow.report.stage_reports.report import SampleText
from mlxflow.storage import report_structs

_TEXT_TEMPERATURE = 0.8


class SampleRequest(NamedTuple):
    """The requested samples.

    Attributes:
        prompts: texts to continue, questions for models with a chat template; empty for held-out documents.
        num_prompts: number of held-out documents.
        prompt_tokens: tokens of a document in a prompt.
        max_tokens: upper bound of generated tokens.
        temperature: of sampling; "auto" for 0 in answers, 0.8 in continued texts.
        seed: of sampling.
    """

    prompts: tuple[str, ...]
    num_prompts: int
    prompt_tokens: int
    max_tokens: int
    temperature: float | Literal["auto"]
    seed: int


class _Asked(NamedTuple):
    """The prompts for every model.

    Attributes:
        texts: to continue; models with a chat template answer those from the workflow.
        questions: of held-out conversations.
        tokenizer: of the tokens of the questions; None without any.
        are_messages: whether the texts go through a model's chat template.
    """

    texts: list[str]
    questions: list[Any]
    tokenizer: Any
    are_messages: bool


class _Texts(NamedTuple):
    """The generated texts of a model with their prompts; see `SampleText`."""

    text: str
    prompt: str | None = None
    question: str | None = None
    answer: str | None = None


def write_samples(
    request: SampleRequest, models: Mapping[str, Path], *, reports: Mapping[str, Path], validation: tuple[Path, ...]
) -> list[SampleText]:
    """Return the text that each model generates for each prompt; equal models generate equal texts.

    Args:
        request: the requested samples.
        models: `model.safetensors` of each model, by reference such as "quantize:q4".
        reports: of the stages that made them, by the same references.
        validation: validation tokens, `tokenizer.json` and `tokenizer_request.json`; empty if there are prompts.

    Raises:
        ArtifactError: a model cannot be opened.
    """
    import mlx.core as mx

    prompts = _choose_prompts(request, models, validation)
    samples: list[SampleText] = []
    for reference, path in models.items():
        key = model_key(report_structs.read_provenance(reports[reference], advice=advise_build(reference)))
        try:
            texts_of_model = _written(request, path.parent, prompts)
            mx.synchronize()  # on Metal, an error may be raised later than it happened, by the next model's work
        except (RuntimeError, CallError) as error:  # out of memory, or an id that the model lacks: without this model
            samples.append(SampleText(model=reference, model_key=key, error=reason_of(error, None)))
            continue
        samples += [SampleText(model=reference, model_key=key, **texts._asdict()) for texts in texts_of_model]
    return samples


def _choose_prompts(request: SampleRequest, models: Mapping[str, Path], validation: tuple[Path, ...]) -> _Asked:
    if request.prompts or not models:
        return _Asked(list(request.prompts), [], None, are_messages=True)
    tokens = TokenFile.open(validation[0])
    tokenizer = GuardedTokenizer(validation[1].parent)
    if tokens.has_conversations:
        template = open_template(validation[1].parent, tokenizer.call)
        questions = held_out_questions(tokens, tokenizer, template, count=request.num_prompts)
        if questions:
            return _Asked([], questions, tokenizer, are_messages=False)
    texts = held_out_beginnings(tokens, tokenizer, count=request.num_prompts, num_tokens=request.prompt_tokens)
    return _Asked(texts, [], None, are_messages=False)


def _written(request: SampleRequest, folder: Path, prompts: _Asked) -> list[_Texts]:
    """Return the texts of one model; an entry with a question is an answer, one without continues its prompt."""
    writer = Writer(folder)
    is_chat = prompts.are_messages and writer.has_template
    likeliest = bool(prompts.questions) or is_chat
    temperature = request.temperature if request.temperature != "auto" else 0.0 if likeliest else _TEXT_TEMPERATURE
    sampling = Sampling(request.max_tokens, temperature, request.seed)
    texts: list[_Texts] = []
    for text in prompts.texts:
        ids = writer.chat_ids([{"role": "user", "content": text}]) if is_chat else writer.text_ids(text)
        written = "".join(writer.write(ids, sampling))
        texts.append(_Texts(written, question=text) if is_chat else _Texts(written, prompt=text))
    if prompts.questions:
        reads_ids = writer.tokenizer.digest_vocabulary() == prompts.tokenizer.digest_vocabulary()
        for one in prompts.questions:
            ids = one.ids if reads_ids else _ids_of_another(writer, one.text)
            texts.append(_Texts("".join(writer.write(ids, sampling)), question=one.text, answer=one.answer))
    return texts


def _ids_of_another(writer: Writer, text: str) -> list[int]:
    """Return the ids of a question for a model with another tokenizer than that of the tokens."""
    ids: list[int] = writer.text_ids(text)
    if writer.has_template:
        ids = writer.chat_ids([{"role": "user", "content": text}])
    return ids
