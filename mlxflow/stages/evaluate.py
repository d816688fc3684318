"""Measure the accuracy of models on tasks, and how it differs between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.evaluation import lm_eval_names
from mlxflow.evaluation.task_inputs import task_files
from mlxflow.evaluation.task_table import TaskTable
from mlxflow.messages import terminal
from mlxflow.messages.errors import StageError
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context
from mlxflow.storage.toml_tables import MAX_ROWS, Problem
from mlxflow.workflow.stage import Artifacts, Beside, model_files_of

if TYPE_CHECKING:
    from mlxflow.evaluation.job import EvaluationRequest
    from mlxflow.evaluation.lm_eval_tasks import LmEvalRule
    from mlxflow.evaluation.own_tasks import ScoringRule
    from mlxflow.report.stage_reports.evaluate import AccuracyRow, DifferenceRow, EvaluateReport

VERSION = 3  # documents are kept apart in 16-bit models whose rounding was taken for another position

#: A workflow file that names no stage does not build it: it has no tasks by default.
ONLY_IF_WRITTEN = True

#: What is evaluated follows from the models that the workflow builds.
FOLLOWS = ("train", "quantize")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[evaluate]` table."""

    models: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(
            min_length=1,
            description='models to compare, the first is the reference: stages ("stage:*" is all variants), model '
            "folders, GGUF files or hub ids",
        ),
    ] = ("train", "quantize:*")
    tasks: Annotated[
        tuple[Annotated[str, Meta(min_length=1)] | TaskTable, ...],
        Meta(description="JSONL files, YAML files of lm-eval or names of its tasks; or tables with such a source"),
    ] = ()
    batch_size: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="most rows in one forward pass")] = 16
    long_prompts: Annotated[
        Literal["truncate", "refuse"],
        Meta(
            description="prompts that do not fit into the model's context with their answers: leave out their first "
            "tokens and count them, or fail"
        ),
    ] = "truncate"
    confidence: Annotated[float, Meta(gt=0, lt=1, description="of the intervals of differences between models")] = 0.95
    min_accuracy: Annotated[
        float,
        Meta(ge=0, le=1, description="of every model; under it the stage fails and publishes nothing; 0: no gate"),
    ] = 0.0
    max_accuracy_drop: Annotated[
        float, Meta(ge=0, le=1, description="from the first model; over it the stage fails likewise; 0: no gate")
    ] = 0.0
    trust_remote_code: Annotated[
        bool, Meta(description="whether Python code of model folders and of tasks may run; read it first")
    ] = False

    def __post_init__(self) -> None:
        """Make every task a table with a name."""
        tasks = tuple((TaskTable(source=one) if isinstance(one, str) else one).named() for one in self.tasks)
        msgspec.structs.force_setattr(self, "tasks", tasks)

    def problems(self) -> Iterator[Problem]:
        """Yield tasks with the same name."""
        names: list[str] = []
        for index, one in enumerate(self.all_tasks):
            if one.name in names:
                expected = f"is also the name of tasks[{names.index(one.name)}]"
                yield Problem(f"tasks[{index}].name", one.name, expected, "Give each task a name of its own.")
            names.append(one.name)

    @property
    def all_tasks(self) -> tuple[TaskTable, ...]:
        """The tasks, as tables."""
        return tuple(one for one in self.tasks if isinstance(one, TaskTable))

    @property
    def trusts_code(self) -> bool:
        """Whether Python code of the models may be run."""
        return self.trust_remote_code


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Models and tasks.

    Attributes:
        models: a file of each model by its name, the first of its folder; the hub's have none.
        names: of all models, in the order of the table.
        files: all files of the models.
        beside: other files of stages' folders.
        tasks: the files of each task, its own first, by the numbers of task and file: "0.1"; those that come with
            lm-eval have none.
    """

    models: dict[str, Path] = {}
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    tasks: dict[str, Path] = {}

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the models from stages, folders or the hub, and the tasks from files."""
        models: dict[str, tuple[Path, ...]] = {}
        beside: list[Beside] = []
        for name in artifacts.expand(config.models, "models"):
            if folder := artifacts.stage_of(name, "models"):
                models[name] = model_files_of(folder)
                beside.append(Beside(folder))
            else:
                trusts = config.trust_remote_code
                models[name] = artifacts.model(name, "models", trusts_code=trusts, needs_tokenizer=True)
        if len(models) == 1:
            _note_idle_gates(config, artifacts)
        tasks: dict[str, Path] = {}
        for index, task in enumerate(config.all_tasks):
            if task.is_file:
                found = task_files(task, _key_of(index), artifacts, trusts_code=config.trust_remote_code)
                tasks |= {f"{index}.{number}": file for number, file in enumerate(found)}
        return cls(
            models={name: files[0] for name, files in models.items() if files},
            names=tuple(models),
            files=tuple(file for files in models.values() for file in files),
            beside=tuple(beside),
            tasks=tasks,
        )


def _key_of(index: int) -> str:
    """Return the key of a task, relative to the table."""
    return f"tasks[{index}].source"


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """The results of every item, and the figures."""

    items: Path = Path("items.jsonl")
    report: Path = Path(layout.REPORT)


def resolve(config: Config, artifacts: Artifacts) -> Config:
    """Return the table with the models that the workflow builds; report missing tasks and a missing lm-eval."""
    if not config.tasks:
        artifacts.note(Problem("tasks", (), "expected at least one", 'Write tasks = ["questions.jsonl"].'))
    for index, task in enumerate(config.all_tasks):
        if not task.is_own:
            artifacts.require_package("lm_eval", _key_of(index), task.source)
            if not task.is_file and (mistake := lm_eval_names.mistake(task.source)):
                artifacts.note(Problem(_key_of(index), task.source, *mistake))
    if config.models != Config().models:
        return config
    models: tuple[str, ...] = ("quantize:*",)
    if artifacts.is_planned("train"):
        models = config.models if artifacts.first("train") == "train" else ("train:*", "quantize:*")
    return msgspec.structs.replace(config, models=models)


def _note_idle_gates(config: Config, artifacts: Artifacts) -> None:
    """Report gates on differences between models where there is one model."""
    gates: dict[str, object] = {"max_accuracy_drop": config.max_accuracy_drop}
    gates |= {f"tasks[{at}].max_accuracy_drop": one.max_accuracy_drop for at, one in enumerate(config.all_tasks)}
    for key, value in gates.items():
        if value not in ("auto", 0):
            advice = "Name the model to compare with before it in models, or remove the key."
            artifacts.note(Problem(key, value, "compares models, and there is one", advice))


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> "EvaluateReport":
    """Evaluate every model on every task, write the results of all items, and check the gates.

    Raises:
        ArtifactError: a model cannot be opened.
        CallError: a task needs a chat template, a metric or a library that is not there.
        SourceError: a task's data cannot be read, or an item does not fit into a model's context.
        StageError: an accuracy is below a gate, or a result is not finite.
    """
    from mlxflow.evaluation.job import run_job
    from mlxflow.report.evaluation_figures import accuracy_row, difference_rows, warnings_of
    from mlxflow.report.stage_reports.evaluate import EvaluateReport, EvaluateRun

    found = run_job(_request(config, inputs, context), context)
    with outputs.items.open("wb") as file:
        for one in found:
            for item in one.result.items:
                file.write(msgspec.json.encode({"task": one.task, "model": one.model, **item.named()}) + b"\n")
    rows = tuple(accuracy_row(one) for one in found)
    differences = tuple(difference_rows(found, inputs.names[0], confidence=config.confidence))
    if lines := [*_missed(config, context.task, rows, differences)]:
        raise StageError("\n".join(lines))
    warnings = tuple(warnings_of(rows))
    terminal.say(*warnings)
    known = sum(one.is_known for one in found)
    return EvaluateReport(
        confidence=config.confidence,
        accuracies=rows,
        differences=differences,
        warnings=warnings,
        run=EvaluateRun(computed=len(found) - known, known=known),
    )


def _request(config: Config, inputs: Inputs, context: Context) -> "EvaluationRequest":
    from mlxflow.device import compute_device
    from mlxflow.evaluation.job import EvaluatedModel, EvaluatedTask, EvaluationRequest

    tasks = []
    for index, task in enumerate(config.all_tasks):
        files = tuple(file for number, file in inputs.tasks.items() if number.partition(".")[0] == str(index))
        key = f"{context.task}.tasks[{index}]"
        tasks.append(EvaluatedTask(task.name, key, task.source, files, _rule(task, config)))
    return EvaluationRequest(
        tuple(
            EvaluatedModel(name, tuple([inputs.models[name]] if name in inputs.models else [])) for name in inputs.names
        ),
        tuple(tasks),
        config.batch_size,
        compute_device.name(),
        f"{context.task}.models",
        f"{context.task}.trust_remote_code",
    )


def _rule(task: TaskTable, config: Config) -> "ScoringRule | LmEvalRule":
    from mlxflow.evaluation.lm_eval_tasks import LmEvalRule
    from mlxflow.evaluation.own_tasks import ScoringRule

    truncates = config.long_prompts == "truncate"
    if not task.is_own:
        shots = None if task.num_fewshot == "auto" else task.num_fewshot
        chat = {"auto": None, "always": True, "never": False}[task.chat]
        return LmEvalRule(shots, task.max_items, task.metric, chat, truncates)
    return ScoringRule(
        task.chat,
        task.max_items,
        task.length_normalized,
        task.max_tokens,
        task.stop,
        task.answer_pattern,
        task.ignore_case,
        truncates,
    )


def _missed(
    config: Config, task: str, rows: "tuple[AccuracyRow, ...]", differences: "tuple[DifferenceRow, ...]"
) -> Iterator[str]:
    """Yield a line for each accuracy that a gate refuses."""
    tables = {one.name: one for one in config.all_tasks}
    for row in rows:
        least = tables[row.task].min_accuracy
        least = config.min_accuracy if least == "auto" else least
        if not row.accuracy >= least:
            yield (
                f"{task}.min_accuracy = {least}: {row.model} has {row.accuracy:.4g} +- {row.standard_error:.2g} on "
                f"{row.task}. Improve the model, or lower the gate."
            )
    for one in differences:
        most = tables[one.task].max_accuracy_drop
        most = config.max_accuracy_drop if most == "auto" else most
        if most and not -one.difference <= most:
            yield (
                f"{task}.max_accuracy_drop = {most}: {one.model} is {-one.difference:.4g} below {one.reference} on "
                f"{one.task} ({config.confidence:.0%} interval {-one.high:.4g} to {-one.low:.4g}). "
                "Improve the model, or raise the gate."
            )
