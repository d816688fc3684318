"""The fields of a GGUF file's header that describe a tokenizer.

llama.cpp splits a text by a rule that it knows by name (`tokenizer.ggml.pre`), so only tokenizers with a known rule can
be written. Two kinds are known: byte-level BPE ("gpt2"), which has merges, and BPE with byte fallback in the form of
SentencePiece ("llama"), whose tokens have scores instead.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import gguf_token_rules as rules
from mlxflow.models import gguf_vocabulary


def fields_of(folder: Path, ends: Sequence[int], vocab_size: int, key: str) -> dict[str, Any]:
    """Return the header's fields of the tokenizer in a model folder.

    Args:
        folder: has `tokenizer.json` and `tokenizer_config.json`, and may have `chat_template.jinja`.
        ends: the ids that end a text by the model's configuration.
        vocab_size: rows of the embedding, V; ids beyond the tokenizer's get unused tokens.
        key: names the model in messages.

    Raises:
        ArtifactError: llama.cpp has no rule for it, or the fields describe a tokenizer that gives other ids.
    """
    try:
        definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{key}: its tokenizer cannot be read ({error}). Name a folder with one.") from error
    texts, kinds = _tokens(definition, vocab_size, key)
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}
    fields |= _byte_level(definition, key) if not _has_fallback(definition) else _scored(definition, texts, key)
    ids = {text: number for number, text in enumerate(texts)}
    fields |= _roles(settings, ids, ends, folder)
    template = folder / "chat_template.jinja"
    written = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(written, list):  # named templates; llama.cpp uses the default one
        written = next((one["template"] for one in written if one.get("name") == "default"), None)
    if written:
        fields["tokenizer.chat_template"] = written
    _require_same_ids(definition, fields, key)
    return fields


def _has_fallback(definition: Mapping[str, Any]) -> bool:
    return bool(definition["model"].get("byte_fallback"))


def _tokens(definition: Mapping[str, Any], vocab_size: int, key: str) -> tuple[list[str], list[int]]:
    """Return the text and llama.cpp's type of every id."""
    model = definition["model"]
    if model.get("type") != "BPE":
        raise ArtifactError(
            f'{key}: its tokenizer is of the type "{model.get("type")}", and only BPE can be written as GGUF. '
            'Export it with format = "mlx".'
        )
    by_id = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, rules.NORMAL)
    if _has_fallback(definition):
        kinds |= {number: rules.BYTE for number, text in by_id.items() if _is_byte(text)}
        if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
            kinds[unknown] = rules.UNKNOWN
    for token in definition.get("added_tokens", ()):
        by_id[token["id"]] = token["content"]
        if kinds.get(token["id"]) != rules.UNKNOWN:
            kinds[token["id"]] = rules.CONTROL if token["special"] else rules.USER_DEFINED
    size = max(by_id) + 1
    if size > vocab_size:
        raise ArtifactError(
            f"{key}: its tokenizer has ids to {size - 1:,}, and its embedding {vocab_size:,} rows. Name another model."
        )
    numbers = range(vocab_size)
    return [by_id.get(one, f"[PAD{one}]") for one in numbers], [kinds.get(one, rules.UNUSED) for one in numbers]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _byte_level(definition: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the fields of a byte-level BPE.

    Raises:
        ArtifactError: llama.cpp has no rule that splits a text as its pre-tokenizer does.
    """
    model = definition["model"]
    wanted = (_plain(definition.get("pre_tokenizer")), bool(model.get("ignore_merges")))
    rule = next((name for name, (own, ignores) in rules.RULES.items() if wanted == (_plain(own), ignores)), "")
    normalizer = (definition.get("normalizer") or {}).get("type")
    if not rule or normalizer not in (None, "NFC"):
        raise ArtifactError(
            f"{key}: llama.cpp has no rule for the pre_tokenizer in its tokenizer.json "
            f"({json.dumps(definition.get('pre_tokenizer'))[:120]}). Known: {', '.join(rules.RULES)}."
        )
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule, "tokenizer.ggml.merges": merges}


def _plain(table: object) -> object:
    """Return a pre-tokenizer without the keys that no id depends on."""
    if isinstance(table, list):
        return [_plain(one) for one in table]
    if isinstance(table, dict):
        return {name: _plain(one) for name, one in sorted(table.items()) if name != "trim_offsets"}
    return table


def _scored(definition: Mapping[str, Any], texts: Sequence[str], key: str) -> dict[str, Any]:
    """Return the fields of a BPE with byte fallback: llama.cpp joins the pair whose token has the best score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(definition["model"]["merges"])
    scores = [-float(ranks.get(text, last)) for text in texts]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_space(definition, key),
    }


def _adds_space(definition: Mapping[str, Any], key: str) -> bool:
    """Return whether a tokenizer in SentencePiece's form puts a space before a text.

    Raises:
        ArtifactError: it changes texts in another way.
    """
    normalizer, split = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [one.get("type") for one in steps]
    if split.get("type") == "Metaspace" and not kinds:
        return split.get("prepend_scheme") != "never"
    replaces = [one for one in steps if one.get("type") == "Replace" and one.get("content") == "▁"]
    is_split_harmless = split in ({}, _SPACES) or split.get("type") == "Split"
    if len(replaces) == 1 and set(kinds) <= {"Prepend", "Replace"} and is_split_harmless:
        return "Prepend" in kinds
    raise ArtifactError(
        f"{key}: its tokenizer.json changes texts before splitting them ({json.dumps(normalizer)[:120]}), which "
        'llama.cpp does not. Export it with format = "mlx".'
    )


_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _roles(settings: Mapping[str, Any], ids: Mapping[str, int], ends: Sequence[int], folder: Path) -> dict[str, Any]:
    """Return the fields of the ids with a role, and whether a text begins with one."""

    def of(name: str) -> int | None:
        written = settings.get(name)
        return ids.get(written["content"] if isinstance(written, dict) else str(written))

    own = of("eos_token")
    every = [*([own] if own is not None else []), *(one for one in ends if one != own)]
    names = ("eos", "eot", "eom")
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": one for name, one in zip(names, every, strict=False)}
    for name, field in (("bos_token", "bos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if (found := of(name)) is not None:
            fields[f"tokenizer.ggml.{field}_token_id"] = found
    added = _added_to_nothing(folder)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is None and added:
        fields["tokenizer.ggml.bos_token_id"] = bos = added[0]
    fields["tokenizer.ggml.add_bos_token"] = bool(added) and added[0] == bos
    fields["tokenizer.ggml.add_eos_token"] = bool(added) and added[-1] == own and len(added) > 1
    return fields


def _added_to_nothing(folder: Path) -> list[int]:
    """Return the ids that a tokenizer adds to an empty text."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids
    return ids


def _require_same_ids(definition: Mapping[str, Any], fields: Mapping[str, Any], key: str) -> None:
    """Check that the tokenizer rebuilt from the fields gives the ids of the original.

    Raises:
        ArtifactError: a text has other ids.
    """
    from tokenizers import Tokenizer

    original = Tokenizer.from_str(json.dumps(definition))
    rebuilt = Tokenizer.from_str(json.dumps(gguf_vocabulary.definition_of(fields.get, key)))
    added = [token["content"] for token in definition.get("added_tokens", ())][:20]
    for text in (*rules.PROBES, *(f"a{token}b" for token in added)):
        pair = [one.encode(text, add_special_tokens=False).ids for one in (original, rebuilt)]
        if pair[0] != pair[1]:
            raise ArtifactError(
                f"{key}: its tokenizer does not survive the form of a GGUF file: {json.dumps(text)} has the ids "
                f'{pair[0][:8]}, and {pair[1][:8]} there. Export it with format = "mlx".'
            )
