"""The tokenizer files of a model folder: copy, compare with another tokenizer, convert to tokenizer.json."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError, reason_of
from mlxflow.messages.os_errors import advise_on
from mlxflow.models import model_code, vocabularies
from mlxflow.storage import model_files, remote_code
from mlxflow.storage.temporary_files import scratch_folder

#: The files of a tokenizer in a model folder.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def require_tokenizer(folder: Path, tokenizer_file: Path, key: str, *, tokens_key: str) -> list[str]:
    """Check that tokens were made with a model's own tokenizer, if its folder has one; return what was added to it.

    Args:
        folder: a model folder.
        tokenizer_file: the `tokenizer.json` that the tokens were made with.
        key: the setting that names the folder, for the message.
        tokens_key: the setting that names the tokenizer of the tokens, for the message.

    Returns:
        the tokens that the model's tokenizer lacks, in the order of their ids.

    Raises:
        ArtifactError: the two tokenizers map ids differently, or the folder's cannot be compared or read.
    """
    own = folder / "tokenizer.json"
    if not own.is_file():
        if model_files.has_vocabulary(model_files.tokenizer_files(folder)) and not any(
            remote_code.tokenizer_code(folder)
        ):
            raise ArtifactError(
                f"{key}: the tokenizer of {folder} has no tokenizer.json, to which that of the tokens could be "
                "compared. Save it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return []
    try:
        added = vocabularies.added_tokens(tokenizer_file, beyond=own)
    except (OSError, ValueError) as error:
        advice = advise_on(error, "Name another")
        raise ArtifactError(f"{key}: the tokenizer of {folder} cannot be read ({error}). {advice}.") from error
    if added is None:
        raise ArtifactError(
            f"{key}: the tokens were not made with the tokenizer of {folder}. Set {tokens_key} to the same folder."
        )
    return added


def copy_companions(folder: Path, to: Path) -> None:
    """Copy the files of a model folder other than weights and config: tokenizer, chat templates, generation defaults.

    Python code, and references to it, are copied only if it is trusted; see `mlxflow.storage.model_files.copy`.
    A tokenizer without `tokenizer.json` is converted.

    Args:
        folder: a model folder.
        to: the folder to copy into.

    Raises:
        ArtifactError: there is no tokenizer, or it needs code that may not be run.
    """
    model_files.copy(folder, model_files.companions(folder), to)
    if not all((to / name).is_file() for name in TOKENIZER_FILES):
        _open_in_transformers(folder).save_pretrained(to)


def require_tokenizer_trust(folder: Path, trust_key: str = "") -> None:
    """Refuse a model folder whose tokenizer needs Python code of the folder that may not be run.

    Args:
        folder: a model folder.
        trust_key: the setting that allows it to run, for the message; empty if it may be one of several.

    Raises:
        ArtifactError: the tokenizer needs code and it is not trusted.
    """
    file, code = remote_code.tokenizer_code(folder)
    if code and not remote_code.trusts_code():
        raise ArtifactError(f"{folder}: {model_code.untrusted_code_message(file, code, trust_key)}")


def _open_in_transformers(folder: Path) -> Any:
    """Return the transformers tokenizer of a model folder; without trust, from a copy of its files without code.

    Raises:
        ArtifactError: it cannot be opened, or needs code that may not be run.
    """
    require_tokenizer_trust(folder)
    from transformers import AutoTokenizer

    try:
        if remote_code.trusts_code():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with scratch_folder() as copied:
            names = [model_files.CONFIG, *model_files.tokenizer_files(folder)]
            model_files.copy(folder, [name for name in names if (folder / name).is_file()], copied)
            return AutoTokenizer.from_pretrained(copied, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = reason_of(error)
        advice = advise_on(error, "Put one into it")
        raise ArtifactError(f"{folder}: its tokenizer cannot be opened ({reason}). {advice}.") from error


def copy_tokenizer(files: Iterable[Path], folder: Path) -> None:
    """Copy tokenizer files into a model folder."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def convert_tokenizer(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a model folder without a tokenizer.json, converted by transformers.

    Raises:
        ArtifactError: the tokenizer cannot be opened or converted.
    """
    opened = _open_in_transformers(folder)
    if getattr(opened, "backend_tokenizer", None) is None:
        raise ArtifactError(f"{folder}: its tokenizer has no form as a tokenizer.json. Name another folder.")
    return opened.backend_tokenizer
