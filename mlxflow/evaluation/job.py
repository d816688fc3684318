"""Evaluate several models on several tasks; a result that an earlier run found is not computed again."""

import gc
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlxflow.evaluation import lm_eval_tasks, own_tasks
from mlxflow.evaluation.accuracy import accuracy_of
from mlxflow.evaluation.item_results import ResultCache, TaskResult
from mlxflow.evaluation.item_tokens import ItemEncoder
from mlxflow.evaluation.lm_eval_tasks import LmEvalRule, LmEvalTask
from mlxflow.evaluation.own_tasks import EncodedTask, ScoringRule, TaskNames
from mlxflow.evaluation.task_file import read_task_file
from mlxflow.evaluation.text_generation import Writer
from mlxflow.messages import terminal
from mlxflow.messages.errors import SourceError
from mlxflow.models import gguf_reading, model_folder, quantized_layers, tokenizer_files
from mlxflow.storage import config_json, model_files
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context

# The folder of cached results in the state folder
_KEPT_FOLDER = "scores"

# Raised when results of earlier code are no longer valid
_FORMAT = 2


class EvaluatedModel(NamedTuple):
    """A model by name.

    Attributes:
        name: as written, such as "quantize:q4".
        files: of its folder, or a GGUF file; empty for a model on the hub.
    """

    name: str
    files: tuple[Path, ...]


class EvaluatedTask(NamedTuple):
    """A task.

    Attributes:
        name: in reports.
        key: its setting, such as "evaluate.tasks[0]", for messages.
        source: as written.
        files: its own file, then others that it reads; empty for a task that comes with lm-eval.
        rule: how its items are scored.
    """

    name: str
    key: str
    source: str
    files: tuple[Path, ...]
    rule: ScoringRule | LmEvalRule


class EvaluationRequest(NamedTuple):
    """What is evaluated.

    Attributes:
        models: the models.
        tasks: the tasks.
        batch_size: largest number of rows in a forward pass.
        device_name: results of other devices differ by rounding, and are not taken.
        models_key: the setting that names the models, for messages.
        trust_key: the setting that allows their Python code to run, for messages.
    """

    models: tuple[EvaluatedModel, ...]
    tasks: tuple[EvaluatedTask, ...]
    batch_size: int
    device_name: str
    models_key: str
    trust_key: str


class Evaluated(NamedTuple):
    """The result of a model on a task.

    Attributes:
        model: its name.
        task: its name.
        result: of its items.
        is_known: whether it is of an earlier run.
    """

    model: str
    task: str
    result: TaskResult
    is_known: bool


class _Folder(NamedTuple):
    """The folder of a model.

    Attributes:
        name: of the model.
        path: of the folder.
        digests: identities of its files by name.
        positions: that the model is made for.
    """

    name: str
    path: Path
    digests: dict[str, str]
    positions: int


def run_job(request: EvaluationRequest, context: Context) -> list[Evaluated]:
    """Return the result of every model on every task, in the order of the tasks.

    Everything that can be wrong with a task is found before any model is loaded.

    Args:
        request: models and tasks.
        context: of the stage.

    Raises:
        ArtifactError: a model cannot be opened.
        CallError: a task needs a chat template, a metric or a library that is not there.
        SourceError: a task's data cannot be read, or an item does not fit.
        StageError: a result is not finite, or lm-eval fails.
    """
    cache = ResultCache(context.state / _KEPT_FOLDER)
    folders = [_find(model, request, context) for model in request.models]
    keys = {(one.name, task.name): _key(one, task, request, context) for one in folders for task in request.tasks}
    known = {}
    if context.published is None:  # else the stage is repeated for a comparison, and computes everything
        known = {pair: result for pair, key in keys.items() if (result := cache.get(key)) is not None}
    missing = {pair: key for pair, key in keys.items() if pair not in known}
    computed: dict[tuple[str, str], TaskResult] = {}
    for folder, name, result in _compute(request, folders, set(missing)):
        computed[folder.name, name] = result
        cache.put(missing[folder.name, name], result)
        _say(context.task, folder.name, name, result)
    if context.digests.changed():  # an input changed during the run: results may belong to another model
        cache.clear(list(missing.values()))
    for (model, name), result in known.items():
        _say(context.task, model, name, result, "known from an earlier run")
    found = known | computed
    pairs = [(one.name, task.name) for task in request.tasks for one in folders]
    return [Evaluated(*pair, found[pair], pair in known) for pair in pairs]


def _compute(
    request: EvaluationRequest, folders: Sequence[_Folder], missing: Set[tuple[str, str]]
) -> Iterator[tuple[_Folder, str, TaskResult]]:
    """Yield model, task and result where no result is known."""
    to_do = [(one, [task for task in request.tasks if (one.name, task.name) in missing]) for one in folders]
    prepared = _prepare(request.tasks, to_do)
    for folder in folders:
        for name, result in _evaluate(folder, prepared.get(folder.name, []), request.batch_size):
            yield folder, name, result


def _say(task: str, model: str, name: str, result: TaskResult, why: str = "") -> None:
    found, num_items = accuracy_of([item.score for item in result.items]), len(result.items)
    items = "item" if num_items == 1 else "items"
    tail = [f"{result.num_truncated:,} prompts truncated"] * bool(result.num_truncated) + [why] * bool(why)
    terminal.say(
        f"{task}: {name}, {model}: accuracy {found.mean:.4g} +- {found.standard_error:.2g}, "
        f"{', '.join([f'{num_items:,} {items}', *tail])}"
    )


def _find(model: EvaluatedModel, request: EvaluationRequest, context: Context) -> _Folder:
    """Return the folder of a model, downloaded from the hub if it has no files."""
    if model.files:
        path = gguf_reading.folder_of(model.files, key=f'{request.models_key} = "{model.name}"')
    else:
        path = model_folder.fetch(model.name, key=request.models_key, trust_key=request.trust_key)
        tokenizer_files.require_tokenizer_trust(path, request.trust_key)
    names = sorted({*model_files.find(path).read, *model_files.beside(path)})
    digests = {name: context.digests.digests(path / name).identity for name in names}
    return _Folder(model.name, path, digests, config_json.num_positions(config_json.read(path)))


def _key(folder: _Folder, task: EvaluatedTask, request: EvaluationRequest, context: Context) -> str:
    """Return a digest of everything that the result of a model on a task depends on."""
    is_lm_eval = isinstance(task.rule, LmEvalRule)
    return digest_json(
        {
            "format": _FORMAT,
            "model": folder.digests,
            "task": [context.digests.digests(file).identity for file in task.files],
            "source": "" if task.files else task.source,
            "rule": [type(task.rule).__name__, *task.rule],
            "batch_size": request.batch_size,
            "device": [context.device, request.device_name],
            "versions": [context.provenance["mlx"], context.provenance["mlxflow"]],
            "lm_eval": lm_eval_tasks.installed_version() if is_lm_eval else "",
        }
    )


#: A task that is ready to be evaluated, with what messages call it.
_Prepared = tuple[EvaluatedTask, EncodedTask | LmEvalTask]


def _prepare(
    tasks: Sequence[EvaluatedTask], to_do: Sequence[tuple[_Folder, Sequence[EvaluatedTask]]]
) -> dict[str, list[_Prepared]]:
    """Return by model the tasks to evaluate, with all their data; no model's weights are read.

    Args:
        tasks: all of them.
        to_do: those without a result, by model.
    """
    needed = {task.name for _, own in to_do for task in own}
    files, opened, mistakes = {}, {}, []
    for task in tasks:
        if task.name not in needed:
            continue
        if isinstance(task.rule, LmEvalRule):
            key = f'{task.key}.source = "{task.source}"'
            opened[task.name] = lm_eval_tasks.open_task(task.source, next(iter(task.files), None), key=key)
        else:
            files[task.name] = read_task_file(task.files[0], task.source)
            mistakes += files[task.name].mistakes
    if mistakes:
        raise SourceError(*mistakes)
    prepared: dict[str, list[_Prepared]] = {}
    for folder, own in to_do:
        if not own:
            continue
        encoder = ItemEncoder(folder.path)
        try:
            for task in own:
                ready: EncodedTask | LmEvalTask
                if isinstance(task.rule, LmEvalRule):
                    ready = opened[task.name]
                else:
                    ready = own_tasks.encode_task(
                        files[task.name],
                        folder.path,
                        task.rule,
                        positions=folder.positions,
                        names=TaskNames(task.source, folder.name, task.key),
                        encoder=encoder,
                    )
                prepared.setdefault(folder.name, []).append((task, ready))
        finally:
            encoder.close()
    return prepared


def _evaluate(folder: _Folder, tasks: Sequence[_Prepared], size: int) -> Iterator[tuple[str, TaskResult]]:
    """Yield name and result of each task of a model, which is loaded for the first."""
    if not tasks:
        return
    writer = Writer(folder.path)
    scored = quantized_layers.for_evaluation(writer.model)
    for task, ready in tasks:
        if isinstance(ready, LmEvalTask) and isinstance(task.rule, LmEvalRule):
            result = lm_eval_tasks.evaluate_lm_eval(
                ready,
                scored,
                folder.path,
                task.rule,
                positions=folder.positions,
                num_rows=writer.num_rows,
                batch_size=size,
                name=folder.name,
            )
        elif isinstance(ready, EncodedTask) and isinstance(task.rule, ScoringRule):
            names = TaskNames(task.source, folder.name, task.key)
            result = own_tasks.evaluate_task(ready, writer, scored, task.rule, batch_size=size, names=names)
        else:
            raise TypeError(task.rule)
        yield task.name, result
    writer.tokenizer.close()
    del writer, scored
    gc.collect()
    mx.clear_cache()
