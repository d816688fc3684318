"""Downloads of models from the Hugging Face hub; besides `hub_store`, no other module accesses it."""

from collections.abc import Sequence
from pathlib import Path

from mlxflow.messages.errors import SourceError, reason_of


def fetch(name: str, *, patterns: Sequence[str], key: str) -> Path:
    """Return a folder with files of a model on the hub, from the local cache or downloaded.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        patterns: glob patterns of the files.
        key: the setting that names the model, for the message.

    Raises:
        SourceError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # any exception: no such model, no network, no permission
        reason = reason_of(error)
        raise SourceError(
            f'{key} = "{name}": cannot be fetched from the hub ({reason}). Name a folder, or fetch it first.'
        ) from error
