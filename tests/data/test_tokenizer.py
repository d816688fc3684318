import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlxflow.data.chatml import CHATML
from mlxflow.data.encoder import Encoder, FastEncoder, LibraryEncoder, choose_encoder, probe_strings
from mlxflow.data.tokenizer import (
    END_OF_TEXT,
    Vocabulary,
    open_vocabulary,
    smallest_dtype,
    train_tokenizer,
    trained_vocabulary,
)
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.errors import SourceError

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
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, encoder: Encoder, text: str) -> None:
    ids = _ids(encoder, text)
    assert 0 not in ids  # the control token is text here
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_control_token_is_one_where_a_template_wrote_it(encoder: Encoder) -> None:
    assert _ids(encoder, f"a{END_OF_TEXT}", special=True)[-1] == 0


def test_many_texts_are_encoded_as_one_by_one_and_in_order(encoder: Encoder) -> None:
    texts = [*TEXTS, *AWKWARD] * 300
    ids, offsets = encoder.encode(texts, special=False)
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    for index in (0, 1, 5, 999, len(texts) - 1):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == _ids(encoder, texts[index])


def test_nothing_encodes_to_nothing(encoder: Encoder) -> None:
    ids, offsets = encoder.encode([], special=False)
    assert len(ids) == 0
    assert offsets.tolist() == [0]


def test_the_fast_engine_serves_a_tokenizer_of_ours(tokenizer: Tokenizer) -> None:
    assert choose_encoder(tokenizer.to_str(), threads=1).name == "fastokens"


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_that_the_fast_engine_does_not_know_is_left_to_the_library() -> None:
    definition = _word_piece().to_str()
    encoder = choose_encoder(definition, threads=2)
    assert encoder.name == "tokenizers"
    assert _ids(encoder, "ab a c") == Tokenizer.from_str(definition).encode("ab a c").ids


def test_an_engine_that_gives_one_other_id_does_not_serve(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FastEncoder.encode

    def almost(self: FastEncoder, texts: Any, *, special: bool) -> Any:
        ids, offsets = right(self, texts, special=special)
        return np.concatenate([ids[:-1], ids[-1:] + 1]), offsets

    monkeypatch.setattr(FastEncoder, "encode", almost)
    assert choose_encoder(tokenizer.to_str(), threads=1).name == "tokenizers"


def test_the_probe_holds_every_script_and_the_control_tokens(tokenizer: Tokenizer) -> None:
    strings = probe_strings(tokenizer.to_str())
    assert len(strings) > 1500
    assert sum(END_OF_TEXT in text for text in strings) > 10
    assert len({character for text in strings for character in text}) > 2000
    assert strings == probe_strings(tokenizer.to_str())


def test_training_merges_what_is_frequent_and_is_the_same_in_another_process(tmp_path: Path) -> None:
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


def test_the_saved_files_give_transformers_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = trained_vocabulary(tokenizer.to_str(), context_length=64, template=None)
    save_vocabulary(
        vocabulary,
        tokenizer_file=tmp_path / "tokenizer.json",
        config_file=tmp_path / "tokenizer_config.json",
    )
    opened = AutoTokenizer.from_pretrained(tmp_path)
    encoder = FastEncoder(vocabulary.definition)
    assert (opened.eos_token_id, opened.model_max_length) == (0, 64)
    for text in (text for text in (*TEXTS, *AWKWARD) if END_OF_TEXT not in text):
        assert opened(text)["input_ids"] == _ids(encoder, text)
        assert opened.decode(_ids(encoder, text)) == text


def test_a_saved_tokenizer_opens_as_the_same_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"])
    vocabulary = trained_vocabulary(trained.to_str(), context_length=64, template=CHATML)
    files = {name: tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")}
    save_vocabulary(vocabulary, tokenizer_file=files["tokenizer.json"], config_file=files["tokenizer_config.json"])
    again = _open(files)
    assert again.definition == vocabulary.definition
    assert again.template is not None
    assert again.template.source == CHATML
    assert again.size == 300
    assert trained.token_to_id("<|im_end|>") == again.end_of_text == 2


def test_what_a_tokenizer_puts_before_a_text_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with_start = Tokenizer.from_str(tokenizer.to_str())
    with_start.add_special_tokens(["<s>"])
    start = with_start.token_to_id("<s>") or 0
    with_start.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    with_start.enable_truncation(4)
    vocabulary = _open(_save(tmp_path, with_start, {"eos_token": {"content": END_OF_TEXT}}))
    assert vocabulary.prefix == (start,)
    assert vocabulary.size == start + 1
    assert json.loads(vocabulary.definition)["truncation"] is None


def test_the_end_of_text_may_stand_in_the_special_tokens_map(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = _save(tmp_path, tokenizer, {})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    files["special_tokens_map.json"] = tmp_path / "special_tokens_map.json"
    assert _open(files).end_of_text == 0


def test_a_template_may_be_a_file_of_the_folder_or_of_the_workflow(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = _save(tmp_path, tokenizer, {"eos_token": END_OF_TEXT, "chat_template": "{{ 'in the config' }}"})
    for found, expected in ((_open(files), "config"), (_open(files, "{{ 'given' }}"), "given")):
        assert found.template is not None
        assert expected in found.template.source
    (tmp_path / "chat_template.jinja").write_text("{{ 'of the folder' }}")
    beside = _open({**files, "chat_template.jinja": tmp_path / "chat_template.jinja"})
    assert beside.template is not None
    assert "folder" in beside.template.source
    assert beside.config["chat_template"] == "{{ 'of the folder' }}"


KEY = 'pretokenize.tokenizer.from = "mine"'


def _broken(folder: Path, tokenizer: Tokenizer, kind: str) -> dict[str, Path]:
    config: dict[str, Any] = {"eos_token": END_OF_TEXT}
    if kind == "no end":
        config = {}
    elif kind == "unknown end":
        config = {"eos_token": "</s>"}
    elif kind == "template":
        config["chat_template"] = "{% for %}"
    elif kind == "disagree":
        config["chat_template"] = "{{ '<|start_header_id|>' }}"
    files = _save(folder, tokenizer, config)
    if kind == "no json":
        del files["tokenizer.json"]
    elif kind == "config":
        files["tokenizer_config.json"].write_text("{")
    return files


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no end", f'{KEY}: names no eos_token. Add "eos_token" to its tokenizer_config.json.'),
        ("unknown end", f"{KEY}: its eos_token '</s>' is not in its vocabulary. Name another \"eos_token\"."),
        (
            "no json",
            f"{KEY}: has no tokenizer.json. Save it once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ),
        (
            "disagree",
            f"{KEY}: the chat template writes '<|start_header_id|>', not a token of this tokenizer. "
            "Name the template that belongs to it.",
        ),
        (
            "config",
            f"{KEY}: its tokenizer_config.json is not valid JSON (Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)). Name another.",
        ),
        (
            "template",
            f"{KEY}: the chat template is not valid (Expected an expression, got 'end of statement block'). Mend it.",
        ),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_told(tokenizer: Tokenizer, tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        _open(_broken(tmp_path, tokenizer, kind))
    assert str(caught.value) == said


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=rf"^{KEY}: its tokenizer.json cannot be read \(.*\)\. Name another\.$"):
        _open({"tokenizer.json": tmp_path / "tokenizer.json"})


def test_a_decoder_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    spoken = Tokenizer(models.BPE({"a": 0, "\u2581": 1, "</s>": 2}, []))
    spoken.pre_tokenizer = pre_tokenizers.Metaspace()
    spoken.decoder = decoders.Metaspace()
    vocabulary = _open(_save(tmp_path, spoken, {"eos_token": "</s>"}))
    encoder = choose_encoder(vocabulary.definition, threads=1)
    assert _ids(encoder, "a a") == spoken.encode("a a").ids
