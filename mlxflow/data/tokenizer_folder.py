"""The files of a tokenizer: download from the hub, conversion by the folder's own code, saving."""

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from mlxflow.data.tokenizer import Vocabulary
from mlxflow.messages.errors import SourceError, reason_of
from mlxflow.models import model_code
from mlxflow.storage import hub, model_files, remote_code


def save_vocabulary(vocabulary: Vocabulary, *, tokenizer_file: Path, config_file: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers and mlx-lm read them.

    They name no Python code: a `tokenizer.json` needs none, and none is written beside it.
    """
    # the library's own `save` reports no reason for a failure
    definition = Tokenizer.from_str(vocabulary.definition).to_str(pretty=True)
    tokenizer_file.write_text(definition, encoding="utf-8")
    config = dict(sorted(remote_code.without_code(vocabulary.config).items()))
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hub_files(name: str, key: str) -> dict[str, Path]:
    """Return the tokenizer files of a model on the hub, from the local cache or downloaded.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        key: the setting that names it, for messages.

    Raises:
        SourceError: it cannot be fetched.
    """
    patterns = [*model_files.TOKENIZER_PATTERNS, *(["*.py"] if remote_code.trusts_code() else [])]
    folder = hub.fetch(name, patterns=patterns, key=key)
    return {file: folder / file for file in model_files.tokenizer_files(folder)}


def converted(files: Mapping[str, Path], to: Path, name: str, *, key: str, trust_key: str) -> dict[str, Path]:
    """Return the files of a tokenizer with a `tokenizer.json`, created by the folder's own code if missing.

    Args:
        files: of its folder, by their names below it.
        to: an empty folder for the new files.
        name: the folder or hub id, for the messages.
        key: the setting that names it, for messages.
        trust_key: the setting that trusts its code, for messages.

    Returns:
        the files unchanged if there is a `tokenizer.json`, or no code that could create one.

    Raises:
        SourceError: its code is not trusted, or fails.
    """
    config = files.get("tokenizer_config.json")
    file, code = remote_code.tokenizer_code(config.parent) if config else ("", "")
    if config is None or not code:
        return dict(files)
    key = f"{key} = {json.dumps(name)}"
    if not remote_code.trusts_code():
        raise SourceError(f"{key}: {model_code.untrusted_code_message(file, code, trust_key)}")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(config.parent, trust_remote_code=True).save_pretrained(to)
    except Exception as error:  # untrusted code: any exception
        reason = reason_of(error)
        raise SourceError(f"{key}: its code cannot be run ({type(error).__name__}: {reason}). Name another.") from error
    return {file: to / file for file in model_files.tokenizer_files(to)}
