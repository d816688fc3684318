from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mlxflow.data.tokenizer import END_OF_TEXT, encode_documents, save_tokenizer, smallest_dtype, train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog " * 5, "def f(x):\n\treturn x  # twice\n" * 5]
AWKWARD = [
    "",
    " ",
    "\0\x01\x7f",
    "🙂👩‍👩‍👧 é e\u0301 中文 \u202e",
    "\r\n\t  x ",
    f"a{END_OF_TEXT}b",
    END_OF_TEXT,
    "'s 'S  's",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.mark.parametrize("text", [*TEXTS, *AWKWARD])
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    tokens, _ = encode_documents(tokenizer, [text])
    assert tokens[-1] == tokenizer.token_to_id(END_OF_TEXT) == 0
    assert 0 not in tokens[:-1]
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == text


def test_the_saved_files_give_transformers_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(
        tokenizer,
        tokenizer_file=tmp_path / "tokenizer.json",
        config_file=tmp_path / "tokenizer_config.json",
        context_length=64,
    )
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert (opened.eos_token_id, opened.model_max_length) == (0, 64)
    for text in (text for text in (*TEXTS, *AWKWARD) if END_OF_TEXT not in text):
        tokens, _ = encode_documents(tokenizer, [text])
        assert opened(text)["input_ids"] == tokens[:-1].tolist()
        assert opened.decode(tokens[:-1].tolist()) == text


def test_offsets_tell_where_each_document_lies(tokenizer: Tokenizer) -> None:
    texts = TEXTS * 200 + [""]
    tokens, offsets = encode_documents(tokenizer, texts)
    assert len(offsets) == len(texts) + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(tokens)
    assert offsets[-1] - offsets[-2] == 1
    np.testing.assert_array_equal(tokens[offsets[1:] - 1], 0)
    np.testing.assert_array_equal(tokens[offsets[3] : offsets[4]], tokens[offsets[1] : offsets[2]])


def test_training_merges_what_is_frequent_and_is_the_same_twice(tmp_path: Path) -> None:
    files = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        trained = train_tokenizer(TEXTS, vocab_size=300)
        files.append(tmp_path / name / "tokenizer.json")
        config = tmp_path / name / "tokenizer_config.json"
        save_tokenizer(trained, tokenizer_file=files[-1], config_file=config, context_length=64)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 257 < trained.get_vocab_size() <= 300
    assert len(trained.encode(" the").ids) == 1


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_take_the_smallest_type_that_holds_them(size: int, dtype: type) -> None:
    assert smallest_dtype(size) == dtype


def test_nothing_encodes_to_nothing(tokenizer: Tokenizer) -> None:
    tokens, offsets = encode_documents(tokenizer, [])
    assert len(tokens) == 0
    assert offsets.tolist() == [0]
