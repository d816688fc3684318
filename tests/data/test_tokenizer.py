import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxflow.data.encoder import Encoder, FastEncoder, LibraryEncoder, choose_encoder
from mlxflow.data.tokenizer import (
    END_OF_TEXT,
    Vocabulary,
    open_vocabulary,
    smallest_dtype,
    train_tokenizer,
)

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


@pytest.fixture(scope="module", params=["fastokens", "tokenizers"])
def encoder(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Encoder:
    if request.param == "fastokens":
        return FastEncoder(tokenizer.to_str())
    return LibraryEncoder(tokenizer.to_str(), threads=3)


def _ids(encoder: Encoder, text: str, *, special: bool = False) -> list[int]:
    found: list[int] = encoder.encode([text], special=special)[0].tolist()
    return found


@pytest.mark.parametrize("text", [*TEXTS, *AWKWARD])
def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer, encoder: Encoder, text: str) -> None:
    ids = _ids(encoder, text)
    assert 0 not in ids  # the control token is text here
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_encoded_as_one_id_if_special_is_set(encoder: Encoder) -> None:
    assert _ids(encoder, f"a{END_OF_TEXT}", special=True)[-1] == 0


def test_a_batch_is_encoded_like_its_texts_one_by_one(encoder: Encoder) -> None:
    texts = [*TEXTS, *AWKWARD] * 300
    ids, offsets = encoder.encode(texts, special=False)
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    for index in (0, 1, 5, 999, len(texts) - 1):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == _ids(encoder, texts[index])


def test_the_empty_text_encodes_to_no_tokens(encoder: Encoder) -> None:
    ids, offsets = encoder.encode([], special=False)
    assert len(ids) == 0
    assert offsets.tolist() == [0]


def test_training_merges_frequent_pairs_and_is_reproducible_across_processes(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, vocab_size=300, special_tokens=["<|im_start|>"])
    script = (
        "from mlxflow.data.tokenizer import train_tokenizer; from tests.data.test_tokenizer import TEXTS; "
        "print(train_tokenizer(TEXTS, vocab_size=300, special_tokens=['<|im_start|>']).to_str())"
    )
    root = Path(__file__).parents[2]
    again = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == trained.to_str()
    assert 257 < trained.get_vocab_size() <= 300
    assert len(trained.encode(" the").ids) == 1
    assert trained.encode("<|im_start|>").ids == [1]


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_take_the_smallest_type_that_holds_them(size: int, dtype: type) -> None:
    assert smallest_dtype(size) == dtype


# --- tokenizers that exist


def _save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path for path in folder.iterdir()}


def _open(files: dict[str, Path], template: str | None = None) -> Vocabulary:
    return open_vocabulary(files, template=template, name="mine", key="pretokenize.tokenizer.from")


def test_a_decoder_of_another_kind_is_left_unchanged(tmp_path: Path) -> None:
    spoken = Tokenizer(models.BPE({"a": 0, "\u2581": 1, "</s>": 2}, []))
    spoken.pre_tokenizer = pre_tokenizers.Metaspace()
    spoken.decoder = decoders.Metaspace()
    vocabulary = _open(_save(tmp_path, spoken, {"eos_token": "</s>"}))
    encoder = choose_encoder(vocabulary.definition, threads=1)
    assert _ids(encoder, "a a") == spoken.encode("a a").ids
