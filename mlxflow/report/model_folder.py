"""The facts about a model's folder on the page: chat template, code, and the licence of its base."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.storage import model_files, remote_code
from mlxflow.storage.model_card import licence_of
from mlxflow.storage.paths import locate


class ModelFolderFacts(NamedTuple):
    """A model's folder.

    Attributes:
        has_template: whether its tokenizer has a chat template.
        has_code: whether it has Python code of its own.
        base: the model that it was made from, as the workflow names it; empty if it was trained from scratch.
        licence: of the base; empty if its folder names none.
    """

    has_template: bool
    has_code: bool
    base: str
    licence: str


def look_at(root: Path, folder: Path, config: Mapping[str, Any]) -> ModelFolderFacts:
    """Return the facts about a model's folder.

    Args:
        root: the workflow's folder.
        folder: of the model.
        config: of the stage that made it, as the lock holds it.
    """
    base = _base_of(config)
    has_template = (folder / "chat_template.jinja").is_file() or bool(
        remote_code.read_table(folder / model_files.TOKENIZER_CONFIG).get("chat_template")
    )
    has_code = "auto_map" in remote_code.read_table(folder / model_files.CONFIG)
    return ModelFolderFacts(has_template, has_code, base, licence_of(locate(base, root)) if base else "")


def _base_of(config: Mapping[str, Any]) -> str:
    """Return the folder or name of the model that a stage begins with; empty for none and for another stage's."""
    model = config.get("model")
    name = model.get("from", "") if isinstance(model, dict) else model
    is_stage = isinstance(name, str) and re.fullmatch(r"(train|quantize)(:.*)?", name)
    return name if isinstance(name, str) and not is_stage else ""
