"""What llama.cpp knows of tokenizers: types of tokens, and the rules by which texts are split before merging."""

from typing import Any

#: llama.cpp's `llama_token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")


_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def _by_regex(regex: str) -> dict[str, Any]:
    """Return a pre-tokenizer that splits by a regex, then maps bytes to characters."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES | {"use_regex": False}]}


#: llama.cpp's rules: the pre-tokenizer of `tokenizer.json`, and whether a whole word that is a token skips the merges.
RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_BYTES, False),
    "smollm": ({"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, False),
    "qwen2": (_by_regex(_QWEN2), False),
    "llama-bpe": (_by_regex(_CL100K), True),
    "dbrx": (_by_regex(_CL100K), False),
    "gpt-4o": (_by_regex(_O200K), False),
    "tekken": (_by_regex(_TEKKEN), True),
}

#: Texts whose ids decide whether a rebuilt tokenizer is the same: words, numbers, white space, code, other scripts
PROBES = (
    "Hello, world! It's 2026; we've 1234567 things (and 3.14159).",
    "  two  spaces\n\n\tand a tab\r\n",
    "def f(x):\n    return x ** 2 + 0x1F  # comment\n",
    "naïve café — “quotes” … 100 €",
    "日本語のテキスト 한국어 텍스트 текст עברית नमस्ते",
    "👩‍👩‍👧 🚀 ﬁ ½ ²",
    "CamelCase snake_case kebab-case UPPER i'LL DON'T",
    "",
    " ",
)
