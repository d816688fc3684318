"""Quantization plans checked against the architecture alone: no artifact is needed and no weight is made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxflow.config import Problem, word
from mlxflow.errors import ArtifactError, WorkflowError
from mlxflow.stages.train import shape_config
from mlxflow.workflow import Stage, Workflow, shown_path


def check_plans(workflow: Workflow) -> None:
    """Hold the settings of every train and quantize stage against the architecture, where that is known here.

    Raises:
        WorkflowError: one line for each entry of `layers`, and each `document_mask`, that does not fit.
    """
    lines = [*_mask_mistakes(workflow), *_plan_mistakes(workflow)]
    if lines:
        raise WorkflowError(*lines)


def _mask_mistakes(workflow: Workflow) -> Iterator[str]:
    """Yield a line for every `document_mask` that the model to go on from cannot have."""
    from mlxflow import models, packed

    for one in (one for one in workflow.stages if one.name == "train"):
        config: Any = one.config
        architecture = _read(workflow.root / config.model.from_) if config.model.from_ else None
        tokens: Any = workflow.find(config.input).config
        if architecture is None or config.document_mask is not True or tokens.packing == "none":
            continue
        if packed.has_row_state(models.skeleton(architecture)):
            expected = f"{architecture['model_type']} counts positions through the whole row"
            advice = 'Set document_mask = false, or pretokenize.packing = "none".'
            yield word(Problem("document_mask", True, expected, advice), shown_path(workflow.path), one.table)


def _plan_mistakes(workflow: Workflow) -> list[str]:
    """Return a line for each entry of `layers` that does not fit."""
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
    return lines


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
