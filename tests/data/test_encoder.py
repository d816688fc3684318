from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mlxflow.data.encoder import FastEncoder, choose_encoder, probe_strings
from mlxflow.data.tokenizer import (
    END_OF_TEXT,
)
from tests.data.test_tokenizer import _ids, encoder, tokenizer  # noqa: F401


def test_the_fast_engine_encodes_with_our_tokenizers(tokenizer: Tokenizer) -> None:  # noqa: F811
    assert choose_encoder(tokenizer.to_str(), threads=1).name == "fastokens"


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))  # noqa: F811
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_unsupported_tokenizers_are_encoded_by_the_library() -> None:
    definition = _word_piece().to_str()
    encoder = choose_encoder(definition, threads=2)  # noqa: F811
    assert encoder.name == "tokenizers"
    assert _ids(encoder, "ab a c") == Tokenizer.from_str(definition).encode("ab a c").ids


def test_an_engine_with_one_different_id_is_not_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    right = FastEncoder.encode

    def almost(self: FastEncoder, texts: Any, *, special: bool) -> Any:
        ids, offsets = right(self, texts, special=special)
        return np.concatenate([ids[:-1], ids[-1:] + 1]), offsets

    monkeypatch.setattr(FastEncoder, "encode", almost)
    assert choose_encoder(tokenizer.to_str(), threads=1).name == "tokenizers"


def test_the_probe_holds_every_script_and_the_control_tokens(tokenizer: Tokenizer) -> None:  # noqa: F811
    strings = probe_strings(tokenizer.to_str())
    assert len(strings) > 1500
    assert sum(END_OF_TEXT in text for text in strings) > 10
    assert len({character for text in strings for character in text}) > 2000
    assert strings == probe_strings(tokenizer.to_str())
