import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from mlxflow.data.chatml import CHATML
from mlxflow.data.encoder import FastEncoder
from mlxflow.data.tokenizer import (
    END_OF_TEXT,
    train_tokenizer,
    trained_vocabulary,
)
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.messages.errors import SourceError
from tests.data.test_tokenizer import AWKWARD, TEXTS, _ids, _open, _save, encoder, tokenizer  # noqa: F401


def test_the_saved_files_give_transformers_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    vocabulary = trained_vocabulary(tokenizer.to_str(), context_length=64, template=None)
    save_vocabulary(
        vocabulary,
        tokenizer_file=tmp_path / "tokenizer.json",
        config_file=tmp_path / "tokenizer_config.json",
    )
    opened = AutoTokenizer.from_pretrained(tmp_path)
    encoder = FastEncoder(vocabulary.definition)  # noqa: F811
    assert (opened.eos_token_id, opened.model_max_length) == (0, 64)
    for text in (text for text in (*TEXTS, *AWKWARD) if END_OF_TEXT not in text):
        assert opened(text)["input_ids"] == _ids(encoder, text)
        assert opened.decode(_ids(encoder, text)) == text


def test_a_saved_tokenizer_opens_as_the_same_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
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


def test_tokens_that_a_tokenizer_prepends_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    with_start = Tokenizer.from_str(tokenizer.to_str())
    with_start.add_special_tokens(["<s>"])
    start = with_start.token_to_id("<s>") or 0
    with_start.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    with_start.enable_truncation(4)
    vocabulary = _open(_save(tmp_path, with_start, {"eos_token": {"content": END_OF_TEXT}}))
    assert vocabulary.prefix == (start,)
    assert vocabulary.size == start + 1
    assert json.loads(vocabulary.definition)["truncation"] is None


def test_end_of_text_is_read_from_the_special_tokens_map(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    files = _save(tmp_path, tokenizer, {})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    files["special_tokens_map.json"] = tmp_path / "special_tokens_map.json"
    assert _open(files).end_of_text == 0


def test_a_template_may_be_a_file_of_the_folder_or_of_the_workflow(tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
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


def _broken(folder: Path, tokenizer: Tokenizer, kind: str) -> dict[str, Path]:  # noqa: F811
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
            f"{KEY}: the chat template is not valid (Expected an expression, got 'end of statement block'). Fix it.",
        ),
    ],
)
def test_a_folder_without_a_tokenizer_is_an_error(tokenizer: Tokenizer, tmp_path: Path, kind: str, said: str) -> None:  # noqa: F811
    with pytest.raises(SourceError) as caught:
        _open(_broken(tmp_path, tokenizer, kind))
    assert str(caught.value) == said


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=rf"^{KEY}: its tokenizer.json cannot be read \(.*\)\. Name another\.$"):
        _open({"tokenizer.json": tmp_path / "tokenizer.json"})
