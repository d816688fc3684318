"""Tokenizers in Hugging Face's format: open an existing one, or train a byte-level BPE."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxflow.data.chat import ChatTemplate, markers
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.control_tokens import ControlTokens
from mlxflow.data.long_words import cut_long_words, split_at_words
from mlxflow.data.named_templates import turn_end_of
from mlxflow.data.watched import Work
from mlxflow.data.watched_tokenizer import randomness
from mlxflow.messages.errors import SourceError
from mlxflow.storage.digests import digest_json

#: The token after every document without a template; the first special token of newly trained tokenizers.
END_OF_TEXT = "<|endoftext|>"

#: The smallest byte-level vocabulary: the 256 bytes and END_OF_TEXT.
SMALLEST_VOCAB_SIZE = 257


class Vocabulary(NamedTuple):
    """A tokenizer with its configuration and chat template.

    Attributes:
        definition: `tokenizer.json`, without truncation or padding.
        config: `tokenizer_config.json`.
        size: the largest id plus one.
        end_of_text: the id that ends a document.
        prefix: the ids that the tokenizer prepends to a text.
        template: of conversations, or None.
        subject: the tokenizer's name, for the beginning of error messages.
    """

    definition: str
    config: dict[str, Any]
    size: int
    end_of_text: int
    prefix: tuple[int, ...]
    template: ChatTemplate | None
    subject: str = "the tokenizer"

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The smallest unsigned type that holds every id."""
        return smallest_dtype(self.size)

    @property
    def identity(self) -> str:
        """The digest of everything that ids depend on, except the chat template."""
        return digest_json([json.loads(self.definition), self.end_of_text, self.prefix])

    @property
    def control_tokens(self) -> ControlTokens:
        """The control tokens, which only a template can write."""
        return self.template.control_tokens if self.template else ControlTokens(())

    @property
    def eos_token(self) -> str:
        """The end-of-sequence token of its configuration."""
        return _content(self.config.get("eos_token")) or ""

    def ending_with(self, text: str) -> "Vocabulary":
        """Return the same tokenizer with another end-of-sequence token in its configuration."""
        return self._replace(config={**self.config, "eos_token": text})

    @property
    def token_ids(self) -> dict[str, int]:
        """The id of each added token, including control tokens, by its text."""
        return _added_tokens(self.definition)


def smallest_dtype(size: int) -> "np.dtype[Any]":
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    return np.min_scalar_type(size - 1)


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, special_tokens: Iterable[str] = ()) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) on documents.

    Decoding restores any valid UTF-8 text. Ids are 0 to the vocabulary size minus one; END_OF_TEXT is 0, followed by
    the other special tokens. Very long words are split first, because they would take too long.

    Args:
        documents: the texts; the same texts give the same tokenizer.
        vocab_size: number of ids, special tokens included; a small corpus may give fewer.
        special_tokens: control tokens besides END_OF_TEXT.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True) for text in (END_OF_TEXT, *special_tokens)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split_at_words(cut_long_words(documents)), trainer)
    return tokenizer


def trained_vocabulary(
    definition: str, *, context_length: int, template: str | None, template_key: str = "chat_template"
) -> Vocabulary:
    """Return a newly trained tokenizer with its configuration.

    Args:
        definition: its `tokenizer.json`.
        context_length: positions the model sees.
        template: of conversations, if there are any.
        template_key: the setting that names it, for messages.

    Raises:
        SourceError: the template is invalid.
    """
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template is not None:
        config["chat_template"] = template
        config["eos_token"] = turn_end_of(template) or END_OF_TEXT  # what generation stops at
    tokenizer = Tokenizer.from_str(definition)
    return _vocabulary(tokenizer, config, key=template_key, template_key=template_key, end=END_OF_TEXT)


class Additions(NamedTuple):
    """What is added to an existing tokenizer.

    Attributes:
        tokens: control tokens; those that it has already are left as they are.
        turn_end: the token that ends a turn, its end-of-sequence token from then on; empty for its own.
    """

    tokens: tuple[str, ...] = ()
    turn_end: str = ""


_NO_ADDITIONS = Additions()


def open_vocabulary(
    files: Mapping[str, Path],
    *,
    template: str | None,
    name: str,
    key: str = "tokenizer.from",
    template_key: str = "chat_template",
    additions: Additions = _NO_ADDITIONS,
) -> Vocabulary:
    """Return an existing tokenizer, with added control tokens.

    Args:
        files: of its folder, by their names below it; see `mlxflow.storage.model_files.tokenizer_files`.
        template: of conversations, in place of its own.
        name: the folder or hub id, for the messages.
        key: the setting that names the tokenizer, for messages.
        template_key: the setting that names the template, for messages.
        additions: control tokens to add.

    Raises:
        SourceError: the files are no tokenizer, it has no end-of-text token, or its ids differ between two runs.
    """
    key = f"{key} = {json.dumps(name)}"
    if "tokenizer.json" not in files:
        raise SourceError(
            f"{key}: has no tokenizer.json. Save it once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    subject = f"{key}: its tokenizer.json"
    with Work(subject, size=files["tokenizer.json"].stat().st_size):
        tokenizer = _opened(files["tokenizer.json"], key)
    config = _config_of(files, template, key)
    template_key = key if template is None else template_key
    lacking = [text for text in dict.fromkeys(additions.tokens) if tokenizer.token_to_id(text) is None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in lacking])
    end = config["eos_token"]
    if additions.turn_end:
        config["eos_token"] = additions.turn_end
    return _vocabulary(tokenizer, config, key=key, template_key=template_key, end=end, subject=subject)


def _opened(path: Path, key: str) -> Tokenizer:
    """Return a tokenizer whose ids are reproducible.

    Raises:
        SourceError: the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no more specific class
        raise SourceError(f"{key}: its tokenizer.json cannot be read ({error}). Name another.") from error
    if problem := randomness(tokenizer):
        raise SourceError(f"{key}: its tokenizer.json has {problem}")
    return tokenizer


def _config_of(files: Mapping[str, Path], template: str | None, key: str) -> dict[str, Any]:
    """Return the configuration in a tokenizer's files, including chat template and end-of-sequence token.

    Raises:
        SourceError: there is no end-of-sequence token, or a file is no JSON.
    """
    config = _read_json(files.get("tokenizer_config.json"), key)
    special = _read_json(files.get("special_tokens_map.json"), key)
    end = _content(config.get("eos_token")) or _content(special.get("eos_token"))
    if end is None:
        raise SourceError(f'{key}: names no eos_token. Add "eos_token" to its tokenizer_config.json.')
    config = {**{key: value for key, value in special.items() if key.endswith("_token")}, **config, "eos_token": end}
    if template is None:
        config |= _templates_of(files, config)
    else:
        config["chat_template"] = template
    return config


def _templates_of(files: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat templates in separate files, in the format of `tokenizer_config.json`."""
    texts = {Path(name).stem: files[name].read_text(encoding="utf-8") for name in files if name.endswith(".jinja")}
    named = {Path(name).stem: texts[Path(name).stem] for name in files if "/" in name}
    default = texts.get("chat_template") or config.get("chat_template")
    if not named or isinstance(default, list):
        return {} if default is None else {"chat_template": default}
    every = {**({} if default is None else {"default": default}), **named}
    return {"chat_template": [{"name": name, "template": text} for name, text in every.items()]}


def _vocabulary(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    *,
    key: str,
    template_key: str,
    end: str = "",
    subject: str = "the tokenizer",
) -> Vocabulary:
    """Return a tokenizer with its configuration; `end` defaults to its end-of-sequence token."""
    end = end or config["eos_token"]
    with Work(subject, size=40 * tokenizer.get_vocab_size()):  # bytes of a file
        tokenizer.no_truncation()
        tokenizer.no_padding()
        definition, prefix = tokenizer.to_str(), _prefix(tokenizer)
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    template = None
    if source is not None:
        names = {k: text for k, v in config.items() if k.endswith("_token") and (text := _content(v)) is not None}
        template = compile_template(source, template_key, names, _control_tokens(tokenizer, source))
        _check_markers(tokenizer, template, template_key)
    end_of_text = tokenizer.token_to_id(end)
    if end_of_text is None:
        raise SourceError(f'{key}: its eos_token {end!r} is not in its vocabulary. Name another "eos_token".')
    return Vocabulary(definition, config, size, end_of_text, prefix, template, subject)


def compile_template(
    source: str, key: str, names: Mapping[str, str] | None = None, control_tokens: Iterable[str] | None = None
) -> ChatTemplate:
    """Return a compiled chat template.

    Args:
        source: the Jinja text.
        key: the setting that names it, for the message.
        names: special tokens that it may use.
        control_tokens: of the tokenizer; those that the template contains if there is no tokenizer yet.

    Raises:
        SourceError: the template is invalid.
    """
    try:
        return ChatTemplate(source, names or {}, control_tokens, subject=f"{key}: the chat template")
    except TemplateProblem as error:
        raise SourceError(f"{key}: the chat template is not valid ({error}). Fix it.") from error


def _control_tokens(tokenizer: Tokenizer, source: str) -> list[str]:
    """Return the control tokens of a tokenizer: its special tokens, and added tokens that the template writes."""
    named = set(markers(source))
    added = tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special or token.content in named]


def _added_tokens(definition: str) -> dict[str, int]:
    return {str(token["content"]): int(token["id"]) for token in json.loads(definition).get("added_tokens") or []}


def _check_markers(tokenizer: Tokenizer, template: ChatTemplate, key: str) -> None:
    """Refuse a template whose control tokens are plain text to the tokenizer.

    Raises:
        SourceError: names these tokens.
    """
    wrong = [text for text in markers(template.source) if text[0] == "<" and tokenizer.token_to_id(text) is None]
    if wrong:
        listed = ", ".join(repr(text) for text in wrong[:5])
        raise SourceError(
            f"{key}: the chat template writes {listed}, not a token of this tokenizer. "
            "Name the template that belongs to it."
        )


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that the tokenizer prepends to a text, such as a beginning-of-sequence token."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return tuple(whole[:begin])
    return ()


def _read_json(path: Path | None, key: str) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{key}: its {path.name} is not valid JSON ({error}). Name another.") from error
    return value if isinstance(value, dict) else {}


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
