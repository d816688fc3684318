"""Quantization plans checked against the architecture alone: no artifact is needed and no weight is made."""

import json
from pathlib import Path
from typing import Any

from mlxflow.errors import WorkflowError
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
    return _shape(trained.model, tokens)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except OSError:
        return None
    return found


def _shape(shape: Any, tokens: Any) -> dict[str, Any]:
    from mlxflow import models

    return models.llama_config(
        vocab_size=tokens.tokenizer.vocab_size,  # at most so many; a plan looks at widths alone
        context_length=tokens.context_length,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_theta=shape.rope_theta,
        end_of_text=0,
    )
