"""A conversation: every answer is the one to all messages so far, and only what is new is read for it."""

import json
from pathlib import Path

import pytest

from mlxflow.data.chatml import CHATML
from mlxflow.evaluation.chat_session import ChatSession, until
from mlxflow.evaluation.text_generation import Sampling, TokenCache, Writer
from tests.small_models import write_llama

GREEDY = Sampling(8, 0.0, 0)


def write_chat_model(folder: Path, *, special: list[str], template: str | None) -> Path:
    """Write a small model folder with a tokenizer that has some control tokens."""
    folder.mkdir()
    texts = ["who are you? a model. why? because."]
    write_llama(folder, texts, special=special, template=template, context_length=512)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model."""
    path = tmp_path_factory.mktemp("chat") / "model"
    return write_chat_model(path, special=["<|im_start|>", "<|im_end|>"], template=CHATML)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids of a prompt were read at a time."""
    counts: list[int] = []
    original = TokenCache.read

    def counted(self: TokenCache, ids: list[int]) -> object:
        counts.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(TokenCache, "read", counted)
    return counts


def test_each_answer_sees_the_whole_conversation_and_only_new_tokens_are_prefilled(
    folder: Path, read: list[int]
) -> None:
    writer = Writer(folder)
    session = ChatSession(writer, "be short")
    for text in ("who are you?", "why?", "who?"):
        asked = [*session.messages, {"role": "user", "content": text}]
        ids = writer.chat_ids(asked)
        read.clear()
        answer = "".join(session.answer(text, GREEDY))
        assert session.messages == [*asked, {"role": "assistant", "content": answer}]
        new = sum(read)
        assert answer == "".join(writer.write(ids, GREEDY))
        if len(asked) > 2:
            assert new < len(ids) / 2
        else:
            assert new == len(ids)


def test_an_interrupted_answer_is_kept_up_to_the_interruption(folder: Path) -> None:
    writer = Writer(folder)
    session = ChatSession(writer)
    answer = session.answer("who are you?", GREEDY)
    piece = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert session.messages[-1] == {"role": "assistant", "content": piece}
    ids = writer.chat_ids([*session.messages, {"role": "user", "content": "why?"}])
    assert "".join(session.answer("why?", GREEDY)) == "".join(writer.write(ids, GREEDY))


def test_a_new_conversation_starts_without_history(folder: Path) -> None:
    session = ChatSession(Writer(folder), "be short")
    first = list(session.answer("who are you?", GREEDY))
    session.reset("be short")
    assert list(session.answer("who are you?", GREEDY)) == first
    session.reset()
    assert session.messages == []


def test_without_a_template_chatml_is_used_and_its_end_marker_stops_an_answer(tmp_path: Path) -> None:
    writer = Writer(write_chat_model(tmp_path / "plain", special=[], template=None))
    session = ChatSession(writer)
    assert not session.ends_turns
    text = writer.tokenizer.decode(writer.chat_ids([{"role": "user", "content": "why?"}]))
    assert text == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert ChatSession(Writer(write_chat_model(tmp_path / "known", special=["<|im_end|>"], template=None))).ends_turns


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "b"], "ab"),
        (["a<|im", "_end|>b", "c"], "a"),
        (["a<|", "im_", "e", "nd"], "a<|im_end"),
        (["<|im_end|>"], ""),
        (["a<", "<|im_end|>"], "a<"),
    ],
)
def test_until_stops_at_the_stop_string(pieces: list[str], expected: str) -> None:
    assert "".join(until(pieces, "<|im_end|>")) == expected


def test_until_yields_text_as_soon_as_it_cannot_be_part_of_the_stop_string() -> None:
    assert list(until(["a", "b<", "c"], "<|im_end|>")) == ["a", "b", "<c"]
    assert json.dumps(list(until([], "x"))) == "[]"
