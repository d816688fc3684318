"""The facts for the README.md of a model that a stage made; see `mlxflow.storage.model_card`."""

from pathlib import Path
from typing import Any

import msgspec

from mlxflow.storage import gguf_header, model_card, model_files
from mlxflow.storage.run_context import Context
from mlxflow.workflow.model import Stage
from mlxflow.workflow.stage import paths_of, summary


def write(stage: Stage, inputs: msgspec.Struct, context: Context, figures: msgspec.Struct) -> None:
    """Write the README.md of an artifact if it is a model: a folder with a configuration, or an export.

    Args:
        stage: that made it.
        inputs: with paths that can be opened.
        context: of the stage; its folder has all other files but the report.
        figures: of the report.
    """
    if not (context.folder / model_files.CONFIG).is_file() and stage.name != "export":
        return
    config: Any = stage.config
    model = getattr(config, "model", "")
    sources = [path for path in paths_of(inputs) if path.name == model_files.CONFIG or gguf_header.is_named(path.name)]
    named = getattr(model, "from_", model) or ("" if stage.name == "train" else config.input)
    facts = model_card.CardFacts(
        name=context.name,
        stage=stage.task,
        summary=summary(stage.module),
        version=context.provenance["mlxflow"],
        settings=_without_places(
            model_card.changed_settings(msgspec.to_builtins(config), msgspec.to_builtins(stage.module.Config()))
        ),
        figures=msgspec.to_builtins(figures),
        base=sources[0].parent if sources else None,
        base_name=_without_places(named),
    )
    model_card.write(context.folder, facts)


def _without_places(value: Any) -> Any:
    """Return a value with only the last part of paths that name a place on this machine."""
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(one) for one in value]
    is_place = isinstance(value, str) and (value.startswith(("~", "$", "..")) or Path(value).is_absolute())
    return Path(value).name if is_place else value
