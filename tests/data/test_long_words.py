"""Tests of long words: what is cut, and that nothing else changes."""

import random

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from mlxflow.data.encoder import FastEncoder, LibraryEncoder
from mlxflow.data.long_words import MAX_WORD_LENGTH, cut_long_words, has_long_word
from mlxflow.data.tokenizer import train_tokenizer

_USUAL = ["the quick brown fox jumps over the lazy dog " * 100, "def f(x):\n\treturn x  # twice\n" * 100]


def _dna(length: int) -> str:
    return "".join(random.Random(0).choices("ACGT", k=length))


@pytest.mark.parametrize(
    "run",
    [
        "x" * 30_000,
        _dna(30_000),
        "7" * 30_000,
        " " * 30_000,
        "-" * 30_000,
        "中文" * 15_000,
        "e\u0301" + "é" * 30_000,
        "\x1c" * 30_000,
        "\x1c!" * 15_000,
        "x" * 1_500_000,
    ],
    ids=["x", "dna", "digit", "space", "dash", "chinese", "mark", "separator", "mixed", "windows"],
)
def test_no_word_of_a_cut_text_is_long(run: str) -> None:
    text = f"{_USUAL[0]}{run} {_USUAL[1]}"
    parts = list(cut_long_words([text]))
    assert "".join(parts) == text
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    longest = max(last - first for part in parts for _, (first, last) in split.pre_tokenize_str(part))
    assert longest <= 2 * MAX_WORD_LENGTH
    assert has_long_word(text)


@pytest.mark.parametrize(
    "text",
    [
        *_USUAL,
        "",
        "x" * MAX_WORD_LENGTH,
        "\n".join(["QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=" * 2] * 200),
        "a1" * 10_000,  # many words without a space
        "x \x1c y",
    ],
)
def test_a_text_without_a_long_word_is_not_cut(text: str) -> None:
    assert list(cut_long_words([text])) == [text]
    assert not has_long_word(text)


def test_long_words_train_a_tokenizer_whose_ids_are_those_of_the_library() -> None:
    """Uncut, this training would take minutes."""
    texts = [*_USUAL, _dna(200_000), "7" * 200_000]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    definition = tokenizer.to_str()
    assert '"Split"' not in definition  # the tokenizer has no rule of its own for long words
    fast = FastEncoder(definition).encode(texts, special=False)[0]
    assert fast.tolist() == LibraryEncoder(definition, threads=1).encode(texts, special=False)[0].tolist()
    assert Tokenizer.from_str(definition).decode(fast.tolist()) == "".join(texts)
    assert len(fast) < 200_000
