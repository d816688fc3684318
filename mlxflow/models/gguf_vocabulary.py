"""A `tokenizer.json` rebuilt from the fields of a GGUF file's header; see `gguf_tokenizer`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_token_rules as rules


def definition_of(field: Callable[[str], Any], key: str) -> dict[str, Any]:
    """Return the `tokenizer.json` that the fields of a header describe.

    Args:
        field: returns a field by its full name; None if there is none of that name.
        key: names the file in messages.

    Raises:
        ArtifactError: the kind of tokenizer, or its rule, is not known.
    """
    texts, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    if not texts:
        raise ArtifactError(f"{key}: has no tokenizer. Name a file with one.")
    kinds = kinds or [rules.NORMAL] * len(texts)
    is_used = [kind != rules.UNUSED for kind in kinds]
    vocab = {text: number for number, text in enumerate(texts) if is_used[number]}
    kind = field("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _from_merges(field, vocab, key)
    elif kind == "llama":
        parts = _from_scores(field, texts, kinds, vocab)
    else:
        raise ArtifactError(f'{key}: its tokenizer is of the kind "{kind}", which cannot be read. Known: gpt2, llama.')
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[number] != rules.USER_DEFINED,
        }
        for number, text in enumerate(texts)
        if kinds[number] in (rules.CONTROL, rules.USER_DEFINED, rules.UNKNOWN)
    ]
    begin = field("tokenizer.ggml.bos_token_id") if field("tokenizer.ggml.add_bos_token") else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None if begin is None else _beginning(texts[begin], begin),
        **parts,
    }


def _beginning(text: str, number: int) -> dict[str, Any]:
    """Return a post-processor that puts one token before a text."""
    special, sequence = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, sequence],
        "pair": [special, sequence, {"SpecialToken": {"id": text, "type_id": 1}}, other],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **changed: Any) -> dict[str, Any]:
    usual = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**usual, **changed, "vocab": dict(vocab), "merges": [list(one) for one in merges]}


def _from_merges(field: Callable[[str], Any], vocab: Mapping[str, int], key: str) -> dict[str, Any]:
    """Return the parts of a byte-level BPE.

    Raises:
        ArtifactError: the rule by which a text is split is not known.
    """
    rule = field("tokenizer.ggml.pre")
    if rule not in rules.RULES:
        raise ArtifactError(
            f'{key}: its tokenizer splits texts by the rule "{rule}", which is not known. '
            f"Known: {', '.join(rules.RULES)}."
        )
    split, ignores = rules.RULES[rule]
    return {
        "normalizer": {"type": "NFC"} if rule == "qwen2" else None,
        "pre_tokenizer": split,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, [one.split(" ") for one in field("tokenizer.ggml.merges")], ignore_merges=ignores),
    }


def _from_scores(
    field: Callable[[str], Any], texts: Sequence[str], kinds: Sequence[int], vocab: Mapping[str, int]
) -> dict[str, Any]:
    """Return the parts of a BPE with byte fallback; its merges are every pair whose join is a token, best score first.

    Source: `SentencePieceExtractor` of transformers.
    """
    scores = field("tokenizer.ggml.scores") or [0.0] * len(texts)
    found: list[tuple[float, int, int, str, str]] = []
    for text, number in vocab.items():
        if kinds[number] == rules.NORMAL:
            found += [(-scores[number], vocab[left], vocab[right], left, right) for left, right in _halves(text, vocab)]
    prepends = field("tokenizer.ggml.add_space_prefix") is not False
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prepends else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prepends:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = field("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            [(left, right) for *_, left, right in sorted(found)],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else texts[unknown],
        ),
    }


def _halves(text: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for place in range(1, len(text)):
        left, right = text[:place], text[place:]
        if left in vocab and right in vocab:
            yield left, right


def settings_of(field: Callable[[str], Any], context_length: int) -> dict[str, Any]:
    """Return the `tokenizer_config.json` that the fields of a header describe.

    Args:
        field: returns a field by its full name; None if there is none of that name.
        context_length: of the model, in tokens.
    """
    texts = field("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    for name, own in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        number = field(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= number < len(texts):
            settings[own] = texts[number]
    if template := field("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def ends_of(field: Callable[[str], Any]) -> list[int]:
    """Return the ids that end a text or a turn, the tokenizer's own first."""
    numbers = (field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(one for one in numbers if one is not None))


def require_round_trip(definition: Mapping[str, Any], key: str) -> None:
    """Check that a rebuilt tokenizer decodes what it encodes: texts, and the text of every token.

    Args:
        definition: a `tokenizer.json`.
        key: names the file in messages.

    Raises:
        ArtifactError: a text comes back changed.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(definition))
    special = {token["id"] for token in definition["added_tokens"]}
    texts = [tokenizer.decode([number], skip_special_tokens=False) for number in range(tokenizer.get_vocab_size())]
    whole = [text for number, text in enumerate(texts) if "�" not in text and number not in special]
    normalize = tokenizer.normalizer.normalize_str if definition["normalizer"] == {"type": "NFC"} else str
    for text in (*rules.PROBES, *whole):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != normalize(text):
            raise ArtifactError(
                f"{key}: its vocabulary does not round-trip: {json.dumps(text)} comes back as "
                f"{json.dumps(tokenizer.decode(ids, skip_special_tokens=False))}. Convert the original model instead."
            )
