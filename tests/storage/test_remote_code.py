import json
from pathlib import Path

import pytest

from mlxflow.storage import remote_code


def test_trusting_code_holds_inside_its_block_only() -> None:
    assert not remote_code.trusts_code()
    with remote_code.trusting_code(True):
        assert remote_code.trusts_code()
        with remote_code.trusting_code(False):
            assert not remote_code.trusts_code()
        assert remote_code.trusts_code()
    assert not remote_code.trusts_code()


def _folder(folder: Path, **tables: object) -> Path:
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("key", remote_code.CODE_KEYS)
@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_names_code_finds_each_key_in_each_configuration(tmp_path: Path, file: str, key: str) -> None:
    assert not remote_code.names_code(tmp_path)
    assert remote_code.names_code(_folder(tmp_path, **{file: {key: {"a": "b"}}}))


def test_tokenizer_code_is_the_class_of_the_tokenizer_before_that_of_the_model(tmp_path: Path) -> None:
    _folder(tmp_path, config={"auto_map": {"AutoConfig": "own.Config"}})
    assert remote_code.tokenizer_code(tmp_path) == ("config.json", "own.Config")
    _folder(tmp_path, tokenizer_config={"auto_map": {"AutoTokenizer": [None, "own.Fast"]}})
    assert remote_code.tokenizer_code(tmp_path) == ("tokenizer_config.json", "own.Fast")
    _folder(tmp_path, tokenizer={})
    assert remote_code.tokenizer_code(tmp_path) == ("", "")


def test_copied_keeps_code_only_if_it_is_trusted() -> None:
    config = {"model_file": "a.py", "text_config": {"auto_map": {"A": "b"}, "layers": 2}}
    assert remote_code.copied(config) == {"text_config": {"layers": 2}}
    with remote_code.trusting_code(True):
        assert remote_code.copied(config) == config


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_read_table_of_a_non_table_is_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert remote_code.read_table(tmp_path / "config.json") == {}
    assert remote_code.read_table(tmp_path / "missing.json") == {}
