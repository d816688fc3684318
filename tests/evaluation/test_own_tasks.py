"""Scores of items: the likeliest choice by both rankings, likely completions, generated answers."""

import math
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.evaluation import own_tasks
from mlxflow.evaluation.item_tokens import ItemEncoder
from mlxflow.evaluation.log_likelihood import log_likelihoods
from mlxflow.evaluation.own_tasks import EncodedTask, ScoringRule, TaskNames, encode_task, evaluate_task
from mlxflow.evaluation.task_file import TaskFile, TaskItem
from mlxflow.evaluation.text_generation import Writer
from mlxflow.messages.errors import CallError, SourceError, StageError
from tests.evaluation.test_text_generation import TEMPLATE, TEXTS
from tests.small_models import add_token_without_row, write_llama

RULE = ScoringRule("auto", 0, False, 4, (), "", False, True)
NAMES = TaskNames("q.jsonl", "train", "evaluate.tasks[0]")
POSITIONS = 64


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    write_llama(folder, TEXTS, special=["<|im_start|>", "<|im_end|>"], template=None, context_length=POSITIONS)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one."""
    folder = tmp_path_factory.mktemp("chat")
    write_llama(folder, TEXTS, special=["<|im_start|>", "<|im_end|>"], template=TEMPLATE, context_length=POSITIONS)
    return folder


def _encoded(
    folder: Path, kind: str, *items: TaskItem, rule: ScoringRule = RULE, positions: int = POSITIONS
) -> EncodedTask:
    encoder = ItemEncoder(folder)
    try:
        file = TaskFile(kind, list(items), [])  # type: ignore[arg-type]
        return encode_task(file, folder, rule, positions=positions, names=NAMES, encoder=encoder)
    finally:
        encoder.close()


def test_choices_are_ranked_by_their_sum_or_per_character(plain: Path) -> None:
    texts = ("a small note? a line of text, they say, because it is so", "a")
    item = TaskItem(1, "what is ", (), texts, 0)
    task = _encoded(plain, "choice", item)
    writer = Writer(plain)
    nats = [one.nats for one in log_likelihoods(writer.model, task.items[0].sequences, batch_size=1)]
    assert nats[0] < nats[1]  # the longer text is less likely as a whole
    assert nats[0] / len(texts[0]) > nats[1] / len(texts[1])  # and more for its length
    by_sum = evaluate_task(task, writer, writer.model, RULE, batch_size=2, names=NAMES)
    normalized = RULE._replace(length_normalized=True)
    per_character = evaluate_task(task, writer, writer.model, normalized, batch_size=2, names=NAMES)
    assert [by_sum.items[0].score, per_character.items[0].score] == [0.0, 1.0]
    assert by_sum.metrics == per_character.metrics == {"accuracy_by_sum": 0.0, "accuracy_per_character": 1.0}
    assert by_sum.items[0].nats == pytest.approx(tuple(nats), rel=1e-5)


def test_the_perplexity_of_completions_is_over_all_their_tokens(plain: Path) -> None:
    items = [TaskItem(n, "what is a", (), (text,), 0) for n, text in enumerate((" note?", " line of text."), 1)]
    task = _encoded(plain, "completion", *items)
    writer = Writer(plain)
    found = evaluate_task(task, writer, writer.model, RULE, batch_size=2, names=NAMES)
    tokens = sum(len(one.sequences[0].completion) for one in task.items)
    mean = -math.fsum(item.nats[0] for item in found.items) / tokens
    assert found.metrics == pytest.approx({"nats_per_token": mean, "perplexity": math.exp(mean)})


@pytest.mark.parametrize("stop", [(), (" ",)])
def test_a_generated_answer_is_compared_with_the_accepted_texts(plain: Path, stop: tuple[str, ...]) -> None:
    task = _encoded(plain, "exact match", TaskItem(1, "what is a", (), ("x",), 0))
    writer = Writer(plain)
    rule = RULE._replace(stop=stop)
    written = evaluate_task(task, writer, writer.model, rule, batch_size=1, names=NAMES).items[0]
    assert written.score == 0.0
    assert written.text
    again = _encoded(plain, "exact match", TaskItem(1, "what is a", (), ("x", f" {written.text}\n"), 0))
    assert evaluate_task(again, writer, writer.model, rule, batch_size=1, names=NAMES).items[0].score == 1.0


def test_the_template_is_used_where_there_is_one_unless_the_task_says_otherwise(plain: Path, chat: Path) -> None:
    item = TaskItem(1, "who are you?", (), ("i am",), 0)
    assert _encoded(chat, "completion", item).uses_chat
    assert not _encoded(plain, "completion", item).uses_chat
    assert not _encoded(chat, "completion", item, rule=RULE._replace(chat="never")).uses_chat
    with pytest.raises(CallError) as caught:
        _encoded(plain, "completion", item, rule=RULE._replace(chat="always"))
    because = 'has no chat template, and evaluate.tasks[0].chat = "always". Leave out train, or the task.'
    assert str(caught.value) == f"{plain}: {because}"
    talk = TaskItem(1, "", ({"role": "user", "content": "hi"},), ("i am",), 0)
    with pytest.raises(CallError) as caught:
        _encoded(plain, "completion", talk)
    assert str(caught.value) == (
        f"{plain}: has no chat template, and q.jsonl has messages. Leave out train, or the task."
    )


def test_long_prompts_are_cut_and_counted_or_refused(plain: Path) -> None:
    items = [TaskItem(n, "why? " * n, (), (" because",), 0) for n in (1, 30)]
    whole = _encoded(plain, "completion", *items, positions=10**6)
    length = len(whole.items[1].sequences[0].read)
    cut = _encoded(plain, "completion", *items, positions=length - 5)
    assert [one.cut_tokens for one in cut.items] == [0, 5]
    assert cut.num_truncated == 1
    assert cut.items[1].sequences[0].context == whole.items[1].sequences[0].context[5:]
    with pytest.raises(SourceError) as caught:
        _encoded(plain, "completion", *items, positions=length - 5, rule=RULE._replace(truncates=False))
    assert str(caught.value) == (
        f"q.jsonl:30: is 5 tokens too long for the {length - 5} positions of train. "
        "Shorten it, or let prompts be truncated."
    )
    with pytest.raises(SourceError, match=r"q\.jsonl:1: its answer does not fit into the 1 positions of train"):
        _encoded(plain, "completion", *items, positions=1)


def test_a_model_without_numbers_has_no_accuracy(plain: Path) -> None:
    task = _encoded(plain, "choice", TaskItem(3, "what is ", (), ("a", "b"), 0))
    writer = Writer(plain)
    writer.model.model.norm.weight = mx.full(writer.model.model.norm.weight.shape, float("nan"))
    with pytest.raises(StageError) as caught:
        evaluate_task(task, writer, writer.model, RULE, batch_size=1, names=NAMES)
    assert str(caught.value) == (
        "train: returns numbers that are not finite at q.jsonl:3. Look for weights that are not finite."
    )


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["\n Par", "is\nand"], ("\n",), "Paris"),
        (["Paris."], ("\n",), "Paris."),
        (["a EN", "D b"], ("END", "x"), "a"),
        (["  "], ("\n",), ""),
    ],
)
def test_an_answer_ends_at_a_stop_text(pieces: list[str], stop: tuple[str, ...], expected: str) -> None:
    assert own_tasks.answer_text(iter(pieces), stop) == expected


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("it is 3, so 4", "", "it is 3, so 4"),
        ("it is 3, so 4", r"\d", "4"),
        ("#### 12 #### 13", r"#### (\d+)", "13"),
        ("nothing", r"\d", ""),
        ("ab", r"a(x)?", ""),
    ],
)
def test_the_last_match_of_the_pattern_is_the_answer(text: str, pattern: str, expected: str) -> None:
    assert own_tasks.extracted(text, pattern) == expected


def test_white_space_does_not_count_and_case_if_asked() -> None:
    assert own_tasks.comparable(" New\n York ", ignore_case=False) == "New York"
    assert own_tasks.comparable("Straße", ignore_case=True) == own_tasks.comparable("STRASSE", ignore_case=True)


@pytest.mark.parametrize("kind", ["choice", "exact match"])
def test_items_with_an_id_without_a_row_of_the_embedding_are_named(plain: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    number = add_token_without_row(folder, "ZZZZ")
    if kind == "choice":
        items = [TaskItem(1, "what ", (), ("a", "b"), 0), TaskItem(2, "what ", (), ("a", "b ZZZZ"), 0)]
    else:
        items = [TaskItem(1, "what ", (), ("a",), 0), TaskItem(2, "ZZZZ ", (), ("a",), 0)]
    task = _encoded(folder, kind, *items)
    writer = Writer(folder)
    with pytest.raises(SourceError) as caught:
        evaluate_task(task, writer, writer.model, RULE, batch_size=2, names=NAMES)
    writer.tokenizer.close()
    assert str(caught.value) == (
        f"q.jsonl:2, train: the prompt has the id {number}, the embedding of the model has {number} rows. "
        "Use the tokenizer of the model, or another prompt."
    )
