"""The ids of items: whole texts are encoded, and the border between prompt and completion is where they part."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlxflow.evaluation.item_tokens import ItemEncoder, fit_prompt, fit_sequences
from mlxflow.evaluation.log_likelihood import TokenSequence
from mlxflow.evaluation.task_file import TaskItem
from mlxflow.messages.errors import SourceError
from tests.evaluation.test_text_generation import TEMPLATE, TEXTS
from tests.small_models import write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a chat template that refuses a system's turn."""
    folder = tmp_path_factory.mktemp("model")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    special = ["<|im_start|>", "<|im_end|>"]
    write_llama(folder, TEXTS, special=special, template=refusing, context_length=64)
    return folder


@pytest.fixture
def encoder(folder: Path) -> Iterator[ItemEncoder]:
    encoder = ItemEncoder(folder)
    yield encoder
    encoder.close()


def _item(prompt: str, *texts: str, messages: tuple[dict[str, str], ...] = ()) -> TaskItem:
    return TaskItem(7, prompt, messages, texts, 0)


def test_prompt_and_completion_are_encoded_as_one_text(folder: Path, encoder: ItemEncoder) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = encoder.sequences(_item("what is a ", "note", "line of text"), uses_chat=False, shown="q.jsonl")
    for text, one in zip(("note", "line of text"), found, strict=True):
        assert [*one.context, *one.completion] == tokenizer.encode(f"what is a {text}").ids
    # the space after the prompt belongs to the next word's token
    assert tokenizer.decode(found[0].completion) == " note"
    assert tokenizer.decode(found[0].context) == "what is a"


def test_the_template_writes_the_prompt(folder: Path, encoder: ItemEncoder) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (one,) = encoder.sequences(_item("who are you?", "i am"), uses_chat=True, shown="q.jsonl")
    text = "<|im_start|>user\nwho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert list(one.context) == tokenizer.encode(text, add_special_tokens=False).ids
    messages = ({"role": "user", "content": "who are you?"},)
    ids = encoder.prompt_ids(_item("", "i am", messages=messages), uses_chat=True, shown="q.jsonl")
    assert ids == list(one.context)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(encoder: ItemEncoder) -> None:
    messages = ({"role": "system", "content": "x"}, {"role": "user", "content": "y"})
    with pytest.raises(SourceError) as caught:
        encoder.prompt_ids(_item("", "z", messages=messages), uses_chat=True, shown="q.jsonl")
    assert str(caught.value) == "q.jsonl:7: the chat template refuses it (no system). Fix the line."


def test_an_empty_prompt_stands_after_the_end_of_a_text(folder: Path, encoder: ItemEncoder) -> None:
    (one,) = encoder.sequences(_item("", "what is"), uses_chat=False, shown="q.jsonl")
    assert len(one.context) == 1
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert list(one.completion) == tokenizer.encode("what is").ids


def test_choices_lose_the_same_tokens_of_their_prompt() -> None:
    sequences = [TokenSequence([1, 2, 3, 4], [5]), TokenSequence([1, 2, 3, 4], [6, 7, 8])]
    assert fit_sequences(sequences, 6) == (sequences, 0)  # the last token is not read
    assert fit_sequences(sequences, 4) == ([([3, 4], [5]), ([3, 4], [6, 7, 8])], 2)
    assert fit_sequences(sequences, 3) == ([([4], [5]), ([4], [6, 7, 8])], 3)
    assert fit_sequences(sequences, 2) is None


def test_a_prompt_leaves_room_for_the_answer() -> None:
    assert fit_prompt([1, 2, 3, 4], 8, 4) == ([1, 2, 3, 4], 0)
    assert fit_prompt([1, 2, 3, 4], 6, 4) == ([3, 4], 2)
    assert fit_prompt([1, 2, 3, 4], 4, 4) is None
