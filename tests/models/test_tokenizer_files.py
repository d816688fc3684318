import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mlxflow.messages.errors import ArtifactError
from mlxflow.models.tokenizer_files import copy_tokenizer, require_tokenizer, require_tokenizer_trust
from mlxflow.storage import remote_code


def _save(file: Path, *words: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words])}
    Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(file))
    return file


def test_the_tokenizer_of_a_model_has_the_ids_of_the_tokens(tmp_path: Path) -> None:
    tokens = _save(tmp_path / "tokens/tokenizer.json", "a", "b")
    require_tokenizer(tmp_path, tokens, "train.model.from", tokens_key="pretokenize.tokenizer.from")  # it has none
    _save(tmp_path / "same/tokenizer.json", "a", "b")
    require_tokenizer(tmp_path / "same", tokens, "train.model.from", tokens_key="pretokenize.tokenizer.from")
    _save(tmp_path / "other/tokenizer.json", "b", "a")
    with pytest.raises(ArtifactError) as caught:
        require_tokenizer(tmp_path / "other", tokens, "train.model.from", tokens_key="pretokenize.tokenizer.from")
    assert str(caught.value) == (
        f"train.model.from: the tokens were not made with the tokenizer of {tmp_path / 'other'}. "
        "Set pretokenize.tokenizer.from to the same folder."
    )


def test_a_tokenizer_with_code_needs_trust(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Words", None]}}))
    with pytest.raises(ArtifactError) as caught:
        require_tokenizer_trust(tmp_path, "train.model.trust_remote_code")
    assert str(caught.value) == (
        f"{tmp_path}: its tokenizer_config.json names Python code of its own, own.Words. "
        "Read it, then set train.model.trust_remote_code = true to run it."
    )
    with remote_code.trusting_code(True):
        require_tokenizer_trust(tmp_path)
    _save(tmp_path / "tokenizer.json", "a")
    require_tokenizer_trust(tmp_path)  # this file is opened without code


def test_copied_tokenizer_files_have_the_same_bytes(tmp_path: Path) -> None:
    file = _save(tmp_path / "a/tokenizer.json", "a")
    (tmp_path / "b").mkdir()
    copy_tokenizer([file], tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_bytes() == file.read_bytes()
