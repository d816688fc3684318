"""Tokenizers as fields of a header, and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_token_rules, gguf_tokenizer, gguf_vocabulary

TEXTS = ["a small text of words, numbers 1234 and\nlines\n" * 3, "été déjà vu: naïve café", "x = {'key': [1, 2]}"]
KEY = 'export.model = "train"'


def _byte_level(split: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def with_fallback() -> Tokenizer:
    """Return a tokenizer in the form of SentencePiece, as Gemma's and Mistral's are."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]  # byte tokens are not written in texts
    return Tokenizer.from_str(json.dumps(definition))


def write(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(regex: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), _PLAIN])


def _with_digits() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


#: Makes a tokenizer for each rule of llama.cpp.
BYTE_LEVEL: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: _byte_level(_with_digits()),
    "llama-bpe": lambda: _byte_level(_split(_CL100K), ignore_merges=True),
    "dbrx": lambda: _byte_level(_split(_CL100K)),
    "qwen2": lambda: _byte_level(_split(_CL100K.replace(r"\p{N}{1,3}", r"\p{N}")), normalizer=normalizers.NFC()),
    "gpt-4o": lambda: _byte_level(_split(_regex_of("gpt-4o"))),
    "tekken": lambda: _byte_level(_split(_regex_of("tekken")), ignore_merges=True),
}


def _regex_of(rule: str) -> str:
    """Return the regex of a rule; that of cl100k is written out above."""
    return str(gguf_token_rules.RULES[rule][0]["pretokenizers"][0]["pattern"]["Regex"])


@pytest.mark.parametrize(("rule", "tokenizer"), BYTE_LEVEL.items(), ids=BYTE_LEVEL)
def test_a_byte_level_tokenizer_comes_back_with_the_same_ids(tmp_path: Path, rule: str, tokenizer: Any) -> None:
    own = tokenizer()
    folder = write(tmp_path, own, eos_token="<|end|>", pad_token={"content": "<|pad|>"})
    fields = gguf_tokenizer.fields_of(folder, [0], 400, KEY)
    assert fields["tokenizer.ggml.pre"] == rule
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.padding_token_id"] == 1
    size = own.get_vocab_size()
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{number}]" for number in range(size, 400)]
    assert fields["tokenizer.ggml.token_type"] == [3, 3] + [1] * (size - 3) + [4] + [5] * (400 - size)
    definition = gguf_vocabulary.definition_of(fields.get, KEY)
    gguf_vocabulary.require_round_trip(definition, KEY)
    back = Tokenizer.from_str(json.dumps(definition))
    for text in (*TEXTS, "<|end|>a <tool>b", "e\u0301 12345 !!\r\n\r\n  x"):
        assert back.encode(text).ids == own.encode(text).ids


def test_a_tokenizer_with_byte_fallback_comes_back_with_the_same_ids(tmp_path: Path) -> None:
    own = with_fallback()
    folder = write(tmp_path, own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fields = gguf_tokenizer.fields_of(folder, [2], own.get_vocab_size(), KEY)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    definition = gguf_vocabulary.definition_of(fields.get, KEY)
    gguf_vocabulary.require_round_trip(definition, KEY)
    back = Tokenizer.from_str(json.dumps(definition))
    for text in (*TEXTS, "未知 🚀", "  two spaces"):
        assert back.encode(text).ids == own.encode(text).ids
        assert back.decode(back.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": {"type": "WhitespaceSplit"}},
            'llama.cpp has no rule for the pre_tokenizer in its tokenizer.json ({"type": "WhitespaceSplit"}). Known: '
            "gpt-2, smollm, qwen2, llama-bpe, dbrx, gpt-4o, tekken.",
        ),
        (
            {"normalizer": {"type": "Lowercase"}},
            "llama.cpp has no rule for the pre_tokenizer in its tokenizer.json",
        ),
        (
            {"model": {"type": "WordPiece"}},
            'its tokenizer is of the type "WordPiece", and only BPE can be written as GGUF. '
            'Export it with format = "mlx".',
        ),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), eos_token="<|end|>")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError) as caught:
        gguf_tokenizer.fields_of(folder, [0], 400, KEY)
    assert str(caught.value).startswith(f"{KEY}: {message}")


def test_more_ids_than_rows_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), eos_token="<|end|>")
    with pytest.raises(ArtifactError, match="its tokenizer has ids to 320, and its embedding 300 rows"):
        gguf_tokenizer.fields_of(folder, [0], 300, KEY)


def test_a_vocabulary_without_bytes_does_not_round_trip() -> None:
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    definition = json.loads(tokenizer.to_str())
    gguf_vocabulary.require_round_trip(definition, "x.gguf")
    model = definition["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if text != "z"}
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < 2]
    del model["vocab"]["Ġ"]
    model["merges"] = [one for one in model["merges"] if "Ġ" not in one and "z" not in one]
    with pytest.raises(ArtifactError, match=r"x.gguf: its vocabulary does not round-trip: .* comes back as"):
        gguf_vocabulary.require_round_trip(definition, "x.gguf")


def test_a_token_before_every_text_is_kept(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    folder = write(tmp_path, tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fields = gguf_tokenizer.fields_of(folder, [0, 1], 400, KEY)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.eot_token_id"] == 1
    back = Tokenizer.from_str(json.dumps(gguf_vocabulary.definition_of(fields.get, KEY)))
    assert back.encode("a b").ids == tokenizer.encode("a b").ids
    assert gguf_vocabulary.ends_of(fields.get) == [0, 1]
