"""What a benchmark reads: the training of the workflow and its tokens, or quantized model folders alone."""

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from mlxflow.workflow.stage import Artifacts, follow_training, names_stage

T = TypeVar("T", bound=msgspec.Struct)


class BaseModel(NamedTuple):
    """The model folder that a quantized model was made from, if no stage made it.

    Attributes:
        name: as written in the workflow; empty if there is none.
        files: its configuration first.
    """

    name: str = ""
    files: tuple[Path, ...] = ()


def follow_plan(config: T, artifacts: Artifacts) -> T:
    """Return a benchmark's table whose defaults name nothing that the workflow does not build.

    Where the only models are quantized folders, no training is timed; without tokens, no perplexity is measured.

    Args:
        config: the table.
        artifacts: the plan and the tables of the workflow.
    """
    default: Any = type(config)()
    table: Any = config
    changes: dict[str, Any] = {}
    if table.input == default.input and not artifacts.is_planned("train"):
        changes["input"] = ""
        if table.models == default.models:
            changes["models"] = ("quantize:*",)
    has_training = bool(changes.get("input", table.input))
    if not has_training and table.data == default.data and not artifacts.is_planned("pretokenize"):
        changes["data"] = ""
    config = msgspec.structs.replace(config, **changes) if changes else config
    return follow_training(config, artifacts)


def base_model(references: tuple[str, ...], artifacts: Artifacts) -> BaseModel:
    """Return the model folder that the first quantized model of a folder was made from.

    Args:
        references: of quantize stages.
        artifacts: their tables.
    """
    for reference in references:
        table: Any = artifacts.table(reference)
        name = getattr(table, "model", "")
        if not isinstance(name, str) or not name or names_stage(name):
            continue
        if artifacts.kind_of_model(name) in ("dense", "quantized"):  # a missing folder is reported for its own stage
            return BaseModel(name, artifacts.model(name, "models", trusts_code=table.trust_remote_code))
    return BaseModel()
