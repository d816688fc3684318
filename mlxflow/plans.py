"""Quantization plans checked against the architecture alone: no artifact is needed and no weight is made."""

import json
from pathlib import Path
from typing import Any

from mlxflow.errors import ArtifactError, WorkflowError
from mlxflow.stages.train import shape_config
from mlxflow.workflow import Stage, Workflow, shown_path


def check_plans(workflow: Workflow) -> None:
    """Resolve the plan of every quantize stage whose architecture is known here.

    Raises:
        WorkflowError: one line for each entry of `layers` that does not fit.
    """
    from mlxflow import models
    from mlxflow.quantization.plan import check_supported, resolve
    from mlxflow.stages.quantize_methods import rules_of

    lines: list[str] = []
    for one in (one for one in workflow.stages if one.name == "quantize"):
        architecture = _architecture(workflow, one)
        if architecture is None:
            continue
        config: Any = one.config
        key = f"{shown_path(workflow.path)}: {one.table}"
        try:
            skeleton = models.skeleton(architecture)
            check_supported(resolve(skeleton, default=config.default, rules=rules_of(config), key=key).layers, key)
        except WorkflowError as error:
            lines += error.problems
    if lines:
        raise WorkflowError(*lines)


def _architecture(workflow: Workflow, one: Stage) -> dict[str, Any] | None:
    """Return the `config.json` of what a stage quantizes; None where only the hub knows it."""
    config: Any = one.config
    if config.model:
        return _read(workflow.root / config.model)
    trained: Any = workflow.find(config.input).config
    if trained.model.from_:
        return _read(workflow.root / trained.model.from_)
    tokens: Any = workflow.find(trained.input).config
    # of ids there are at most so many; a plan looks at widths alone
    return shape_config(trained.model, tokens.tokenizer.vocab_size, tokens.context_length, 0)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except OSError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{shown_path(folder)}: its config.json is no JSON ({error}). Mend it.") from error
    return found
