"""`mlxflow check`: print the resolved workflow and check it against its model architectures."""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mlxflow.cli.arguments import add_workflow
from mlxflow.messages import terminal
from mlxflow.messages.errors import ArtifactError, CallError, WorkflowError
from mlxflow.messages.os_errors import advise_on
from mlxflow.models import vocabularies
from mlxflow.models.new_model import new_config
from mlxflow.storage import config_json, gguf_header, paths, remote_code
from mlxflow.storage.toml_tables import Problem, problem_message, toml_value
from mlxflow.training import length, run_warnings
from mlxflow.workflow.loader import load_workflow, resolved_toml
from mlxflow.workflow.model import Stage, Workflow
from mlxflow.workflow.stage import names_stage, token_stage
from mlxflow.workflow.stage_tracking import require_trackers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow check`."""
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Print the resolved workflow and the stages that are left out."""
    workflow = load_workflow(parsed.workflow)
    require_trackers(workflow)
    check_plans(workflow)
    for name, reasons in workflow.left_out.items():
        terminal.say(f"{name}: left out, for no [{name}] is written and its defaults do not fit:", *reasons)
    for one in workflow.stages:
        files = [path.as_posix() for path in one.input_files]
        if said := length.describe_stage(one.settings()["config"], files, workflow.root):
            terminal.say(f"{one.task}: {said}")
        if one.name == "train":
            terminal.say(*_training_warnings(workflow, one))
    terminal.write(resolved_toml(workflow))


def check_plans(workflow: Workflow) -> None:
    """Check the settings of every train and quantize stage whose model architecture is available locally.

    Raises:
        WorkflowError: one line for each entry of `layers`, `document_mask` and tokenizer that does not fit the model.
        ArtifactError: a `config.json` describes no model.
    """
    lines = [*_tokenizer_mistakes(workflow), *_mask_mistakes(workflow), *_plan_mistakes(workflow)]
    if lines:
        raise WorkflowError(*lines)


def _training_warnings(workflow: Workflow, one: Stage) -> Iterator[str]:
    """Yield the warnings about a training that are known without its model; none before its tokens are there."""
    inputs: Any = one.inputs
    outline = run_warnings.outline_of(one.config, workflow.root / inputs.train, workflow.root / inputs.validation)
    if outline is not None:
        yield from (warning.line for warning in run_warnings.before(outline, task=one.task))


def _tokenizer_mistakes(workflow: Workflow) -> Iterator[str]:
    """Yield a line for every model whose tokenizer assigns other ids than the one of its tokens.

    Tokenizers that the workflow trains, and models on the hub, are checked by the stages when they run.
    """
    have_equal_ids = cache(vocabularies.have_equal_ids)  # variants of one model have the same files
    for one in (stage for stage in workflow.stages if stage.name in ("train", "quantize")):
        config: Any = one.config
        reference = token_stage(config)
        folder = _named_folder(workflow, one)
        if folder is None or not reference:
            continue
        tokens = workflow.find(reference)
        settings: Any = tokens.config
        inputs: Any = tokens.inputs
        files = [workflow.root / path for path in inputs.tokenizer if path.name == "tokenizer.json"]
        own = folder / "tokenizer.json"
        if not files or not own.is_file():
            continue
        try:
            is_same = have_equal_ids(own, files[0])
        except (OSError, ValueError) as error:
            advice = advise_on(error, "Fix it")
            raise ArtifactError(f"{paths.shown(folder)}: its tokenizer cannot be read ({error}). {advice}.") from error
        if not is_same:
            key, value = ("model.from", config.model.from_) if one.name == "train" else ("model", config.model)
            setting = f"{tokens.table}.tokenizer.from = {toml_value(settings.tokenizer.from_)}"
            expected = f"has another tokenizer than its tokens, which are made with {setting}"
            advice = f"Set {tokens.table}.tokenizer.from = {toml_value(value)}, or read tokens of another stage."
            yield problem_message(Problem(key, value, expected, advice), paths.shown(workflow.path), one.table)


def _mask_mistakes(workflow: Workflow) -> Iterator[str]:
    """Yield a line for every `document_mask` that the base model does not support.

    Raises:
        ArtifactError: the model's `config.json` describes no model.
    """
    from mlxflow.models import model_folder
    from mlxflow.training import model_choices

    for one in (stage for stage in workflow.stages if stage.name == "train"):
        config: Any = one.config
        folder = _named_folder(workflow, _maker(workflow, one))
        source = workflow.find(config.input)
        tokens: Any = source.config
        if folder is None:
            continue
        architecture = _read(folder)
        with remote_code.trusting_code(workflow.trusts_code(one)):
            skeleton = model_folder.skeleton(architecture, code=folder)
        if (
            config.document_mask is True
            and tokens.packing != "none"
            and model_choices.counts_positions_through_rows(skeleton)
        ):
            expected = f"{architecture['model_type']} counts positions through the whole row"
            advice = f'Set document_mask = false, or {source.table}.packing = "none".'
            yield problem_message(
                Problem("document_mask", True, expected, advice), paths.shown(workflow.path), one.table
            )


def _plan_mistakes(workflow: Workflow) -> list[str]:
    """Return a line for each entry of `layers` that does not fit the model, and for each unsupported method."""
    from mlxflow.models import model_folder
    from mlxflow.quantization.plan import resolve
    from mlxflow.quantization.plan_choice import require_supported

    lines: list[str] = []
    cached: tuple[Any, Any] = (None, None)  # variants of one model mostly follow each other
    for one in (one for one in workflow.stages if one.name == "quantize"):
        architecture, folder = _architecture(workflow, _maker(workflow, one))
        if architecture is None:
            continue
        what = (architecture, folder, workflow.trusts_code(one))
        config: Any = one.config
        key = f"{paths.shown(workflow.path)}: {one.table}"
        try:
            with remote_code.trusting_code(workflow.trusts_code(one)):
                if cached[0] != what:
                    cached = what, model_folder.skeleton(architecture, code=folder)
            plan = resolve(cached[1], default=config.default, rules=[rule.rule for rule in config.layers], key=key)
            length = getattr(_tokens(workflow, config), "context_length", None)
            require_supported(config, cached[1].eval(), plan.layers, context_length=length, key=key)
        except (CallError, WorkflowError) as error:
            lines += error.problems
    return lines


def _tokens(workflow: Workflow, config: Any) -> Any:
    """Return the table of the tokens that a stage reads; None if it reads none."""
    return workflow.find(config.token_stage).config if config.token_stage else None


def _maker(workflow: Workflow, stage: Stage) -> Stage:
    """Return the stage whose model a train or quantize stage has in the end: one that reads no other stage's."""
    while other := _stage_read(stage):
        stage = workflow.find(other)
    return stage


def _stage_read(stage: Stage) -> str:
    """Return the stage whose model a train or quantize stage starts from; empty if it is no stage."""
    config: Any = stage.config
    name = config.model.from_ if stage.name == "train" else config.model or config.input
    return name if names_stage(name) else ""


def _architecture(workflow: Workflow, maker: Stage) -> tuple[dict[str, Any] | None, Path | None]:
    """Return the `config.json` of a stage's model and its folder, where there is one; None of the hub's."""
    folder = _named_folder(workflow, maker)
    if folder is not None:
        return _read(folder), folder
    config: Any = maker.config
    if maker.name == "quantize" or config.model.from_:
        return None, None
    tokens: Any = workflow.find(config.input).config
    # an upper bound: the plan depends on the widths only
    vocab_size = tokens.tokenizer.vocab_size
    return new_config(config.model, vocab_size=vocab_size, context_length=tokens.context_length), None


def _named_folder(workflow: Workflow, stage: Stage) -> Path | None:
    """Return the base model's folder of a train or quantize stage; None without one, or for a model on the hub."""
    inputs: Any = stage.inputs
    files: tuple[Path, ...] = inputs.base if stage.name == "train" else inputs.model
    if not files or _stage_read(stage) or gguf_header.is_named(files[0].name):
        return None
    return workflow.root / files[0].parent


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = config_json.load(folder / "config.json")
    except OSError as error:
        reason = f"its config.json cannot be read ({error.strerror})"
        raise ArtifactError(f"{paths.shown(folder)}: {reason}. {advise_on(error, 'Fix it')}.") from error
    except ValueError as error:
        raise ArtifactError(f"{paths.shown(folder)}: its config.json is no JSON ({error}). Fix it.") from error
    config_json.require_types(config, paths.shown(folder / "config.json"))
    return config
