"""Read, check and resolve a `workflow.toml`."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from mlxflow.messages.errors import WorkflowError
from mlxflow.storage import paths
from mlxflow.storage.toml_tables import Problem, problem_message, read_struct, take_variants, toml_value, unknown_key
from mlxflow.tracking.table import Tracking
from mlxflow.workflow import stage, workflow_text
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.inputs import References
from mlxflow.workflow.matrix import expand_matrix
from mlxflow.workflow.model import Settings, Stage, Workflow
from mlxflow.workflow.ranks import read_ranks
from mlxflow.workflow.stage import Artifacts, StageModule
from mlxflow.workflow.stage_references import CycleError, Known, ReferenceRecorder, ordered, upstream
from mlxflow.workflow.store_table import StoreTable, of_text

#: Every stage, in the order of `doit list`. To add one, add a file to `stages/` and its name here.
STAGES = ("pretokenize", "train", "quantize", "export", "evaluate", "profile", "benchmark", "report")

#: The tables that are no stages.
TABLES: dict[str, type[msgspec.Struct]] = {"workflow": Settings, "tracking": Tracking, "store": StoreTable}

#: The most files that all stages may read together; a file counts once for each stage that reads it.
_MAX_FILES = 100_000

#: The most mistakes that are listed.
_MAX_LINES = 100


def load_workflow(path: Path, disk: Disk | None = None, data: bytes | None = None) -> Workflow:
    """Read and check a workflow file; imports no mlx.

    Args:
        path: the TOML file.
        disk: answers queries of other files; None to query the disk.
        data: content of the file; None to read it.

    Raises:
        WorkflowError: the file is missing, no valid TOML, in a folder that cannot be used, or has mistakes: one line
            for each of them.
    """
    shown = paths.shown(path)
    written = workflow_text.read(path, shown, data)
    return _WorkflowLoader(shown, written.tables).load(path, disk or Disk(path.parent), written.text)


class _WorkflowLoader:
    """Turns a parsed document into a workflow, collecting a line for every mistake on the way."""

    def __init__(self, shown: str, document: dict[str, Any]) -> None:
        self.shown = shown
        self.document = document
        # messages by table, in the file's order
        self.mistakes: dict[str, list[str]] = {name: [] for name in (*document, *STAGES)}
        self.modules = {name: cast("StageModule", importlib.import_module(f"mlxflow.stages.{name}")) for name in STAGES}

    def load(self, path: Path, disk: Disk, text: str) -> Workflow:
        tables: dict[str, Any] = {name: table() for name, table in TABLES.items()}
        read: dict[str, list[tuple[str | None, str, msgspec.Struct]]] = {}
        for name, table in self.document.items():
            if name in TABLES:
                lines = self.mistakes[name]
                tables[name] = read_struct(table, TABLES[name], file=self.shown, key=name, lines=lines) or tables[name]
            elif name in STAGES:
                read[name] = list(self._variants(name, table))
            else:
                guesses = len(self.mistakes) < _MAX_LINES
                self.mistakes[name].append(unknown_key(name, [*TABLES, *STAGES], file=self.shown, guesses=guesses))
        settings: Settings = tables["workflow"]
        workflow = Workflow(path, settings, disk, text)
        workflow.tracking = tables["tracking"]
        lines = self.mistakes.get("workflow", [])
        workflow.ranks = read_ranks(settings.distributed, settings.device, disk, shown=self.shown, lines=lines)
        for name in STAGES:
            for variant, table_, config in read.get(name) or [(None, name, self.modules[name].Config())]:
                workflow.stages.append(Stage(self.modules[name], variant, table_, config, workflow))
        _follow_readers(workflow)
        nameable = self._plan(workflow)
        self._resolve(workflow, nameable, {name for name, made in read.items() if not made})
        self._check_ranks(workflow)
        if any(self.mistakes.values()):
            raise WorkflowError(*self._lines())
        return workflow

    def _lines(self) -> list[str]:
        """Return the lines for all mistakes, at most the first hundred."""
        lines = [line for lines in self.mistakes.values() for line in lines]
        more = len(lines) - _MAX_LINES
        listed = lines[:_MAX_LINES]
        return [*listed, f"{self.shown}: {more:,} more mistakes. Fix these first."] if more > 0 else listed

    def _variants(self, name: str, table: object) -> Iterator[tuple[str | None, str, msgspec.Struct]]:
        """Yield the variant, the key and the struct of each valid table of a stage."""
        seen: dict[str, str] = {}
        if not isinstance(table, list):
            yield from self._read_table(name, name, table, seen)
            return
        if not table:
            self.mistakes[name].append(
                f"{self.shown}: {name} = []: expected a table. Write [{name}] or remove the key."
            )
        for index, written in enumerate(table):
            yield from self._read_table(name, f"{name}[{index}]", written, seen)

    def _read_table(
        self, name: str, key: str, written: object, seen: dict[str, str]
    ) -> Iterator[tuple[str | None, str, msgspec.Struct]]:
        """Yield the variants of one table: one for each combination of a matrix.

        Args:
            name: the stage.
            key: of the table in the file, which has an index in an array of tables.
            written: the value in the file.
            seen: names of earlier variants, by case-folded name.
        """
        lines = self.mistakes[name]
        problems: list[Problem] = []
        if not isinstance(written, dict):
            if key == name:
                read_struct(written, self.modules[name].Config, file=self.shown, key=key, lines=lines)
            else:
                advice = f"Write [[{name}]] on a line of its own and its keys below it."
                lines.append(problem_message(Problem("", written, "expected a table", advice), self.shown, key))
            return
        for table in list(expand_matrix(written, problems)):
            variant = table.pop("name", None)
            if (variant is not None or key != name) and not self._check_name(key, name, variant, seen):
                variant = None
            take_variants(table, self.modules[name].Config, file=self.shown, key=key, lines=lines)
            config = read_struct(table, self.modules[name].Config, file=self.shown, key=key, lines=lines)
            if config is not None:
                yield variant, key, config
        lines += [problem_message(problem, self.shown, key) for problem in problems]

    def _check_name(self, key: str, table: str, variant: object, seen: dict[str, str]) -> bool:
        if variant is None:
            problem = Problem("name", msgspec.UNSET, "missing", f'Each [[{table}]] needs one, such as name = "q4".')
        elif not isinstance(variant, str) or not re.fullmatch(stage.NAME_PATTERN, variant):
            problem = Problem(
                "name", variant, "expected letters, digits, '.', '_' and '-', at most 64", 'Write one such as "q4".'
            )
        elif stage.is_own_name(self.modules[table], variant):
            problem = Problem("name", variant, "is a reserved name of mlxflow", "Write another one.")
        elif variant.casefold() in seen:  # one folder on a case-insensitive file system
            other = seen[variant.casefold()]
            twice = variant == other
            expected = f"named twice in [[{table}]]" if twice else f"differs only by case from {toml_value(other)}"
            problem = Problem("name", variant, expected, "Give each variant a name of its own.")
        else:
            seen[variant.casefold()] = variant
            return True
        if (line := problem_message(problem, self.shown, key)) not in self.mistakes[table]:
            self.mistakes[table].append(line)
        return False

    def _plan(self, workflow: Workflow) -> list[Stage]:
        """Keep the stages that are wanted and those that they read from, and put each after the ones it reads from.

        Args:
            workflow: its stages are changed.

        Returns:
            all stages, also those that are not built, in this order.

        Raises:
            WorkflowError: stages read from one another in a circle.
        """
        known = Known()
        for one in workflow.stages:
            known.add(one.task, one.config)
        wanted = self._wanted(workflow)
        keys = _references(workflow, wanted, known)
        tables = {one.task: one.table for one in workflow.stages}
        try:
            order = ordered(keys)
        except CycleError as error:
            key, reference = keys[error.tasks[0]][error.tasks[1]]
            problem = Problem(
                key, reference, f"reads from itself ({' -> '.join(error.tasks)})", "Name a stage that does not."
            )
            raise WorkflowError(*self._lines(), problem_message(problem, self.shown, tables[error.tasks[0]])) from error
        planned = upstream(wanted, keys)
        workflow.unplanned = [name for name in STAGES if not any(one.partition(":")[0] == name for one in planned)]
        by_task = {one.task: one for one in workflow.stages}
        workflow.stages = [by_task[task] for task in order if task in planned]
        return [by_task[task] for task in order]

    def _wanted(self, workflow: Workflow) -> list[str]:
        """Return the tasks that the file asks for; note names in `workflow.stages` that are none."""
        if not workflow.settings.stages:
            written = {name for name in self.document if name in STAGES}
            return [one.task for one in workflow.stages if one.name in written or (not written and _is_usual(one))]
        wanted = []
        for number, name in enumerate(workflow.settings.stages):
            named = [one.task for one in workflow.stages if name in (one.task, one.name)]
            wanted += named
            if not named and not self.mistakes.get(name.partition(":")[0]):
                known = ", ".join(one.task for one in workflow.stages)
                problem = Problem(f"stages[{number}]", name, "no such stage", f"Known: {known}.")
                self.mistakes.setdefault("workflow", []).append(problem_message(problem, self.shown, "workflow"))
        return wanted

    def _resolve(self, workflow: Workflow, nameable: list[Stage], unread: set[str]) -> None:
        """Resolve the inputs of every stage; leave out stages that are not in the file if their defaults are invalid.

        Args:
            workflow: its stages are changed.
            nameable: these and the stages that are not built.
            unread: names of stages whose tables could not be read; their defaults are not reported.
        """
        broken = {name for name in STAGES if self.mistakes[name]}
        known = Known()
        num_files = 0
        planned = set(workflow.stages)
        known.planned = {one.name for one in planned}
        for one in nameable:
            if one not in planned:
                known.nameable[one.task] = one.file_names
                continue
            if one.name in unread:
                known.add(one.task, one.config, one.file_names)
                continue
            is_written = one.name in self.document
            lines = self.mistakes[one.name] if is_written else []
            not_there = {*workflow.left_out, *workflow.unplanned}
            references = References(
                workflow.disk, known, _changed_keys(one), broken, not_there, self.shown, one.table, lines
            )
            one.config, one.inputs = _find_inputs(one.module, one.config, references)
            one.spellings = references.spellings
            num_files += len(one.input_files)
            self._require_few_files(one, num_files)
            references.check_makers(one.input_files)
            if lines and not is_written:
                workflow.left_out[one.name] = lines
                workflow.stages.remove(one)
            else:
                known.add(one.task, one.config, one.file_names)

    def _check_ranks(self, workflow: Workflow) -> None:
        """Note more ranks than forward passes, or rows, in an update, and gradients that no backend can split."""
        for one in workflow.stages:
            has_gradients = one.most_ranks > 0 and not getattr(one.module, "trains_adapters")(one.config)  # noqa: B009
            scattering = workflow.ranks.cannot_scatter() if has_gradients else None
            for problem in (workflow.ranks.too_many(one.most_ranks, one.task, one.table), scattering):
                line = problem_message(problem, self.shown, "workflow") if problem else ""
                if line and line not in self.mistakes["workflow"]:
                    self.mistakes["workflow"].append(line)

    def _require_few_files(self, stage: Stage, num_files: int) -> None:
        if num_files > _MAX_FILES:
            raise WorkflowError(
                f"{self.shown}: {stage.table}: the stages up to here read {num_files:,} files: "
                f"expected at most {_MAX_FILES:,}. Let fewer variants read many files, or split the workflow."
            )


def _references(workflow: Workflow, wanted: list[str], known: Known) -> dict[str, dict[str, tuple[str, str]]]:
    """Return by task the tasks that each stage names, with the key of its table and the text there.

    Args:
        workflow: its stages.
        wanted: tasks that the file asks for.
        known: has all stages; gets the plan without the stages that follow others.
    """
    followers = {one.task: one for one in workflow.stages if _followed(one)}
    keys: dict[str, dict[str, tuple[str, str]]] = {task: {} for task in followers}
    for one in workflow.stages:
        if one.task not in followers:
            keys[one.task] = _recorded(one, known)
    planned = {task.partition(":")[0] for task in upstream((one for one in wanted if one not in followers), keys)}
    for task, one in followers.items():
        known.planned = planned if planned.intersection(_followed(one)) else None
        keys[task] = _recorded(one, known)
    return {one.task: keys[one.task] for one in workflow.stages}


def _is_usual(stage: Stage) -> bool:
    """Return whether a workflow file that names no stage builds this one."""
    return not getattr(stage.module, "ONLY_IF_WRITTEN", False)


def _followed(stage: Stage) -> tuple[str, ...]:
    """Return the stages that one follows, see `mlxflow.workflow.stage`."""
    followed: tuple[str, ...] = getattr(stage.module, "FOLLOWS", ())
    return followed


def _recorded(stage: Stage, known: Known) -> dict[str, tuple[str, str]]:
    recorder = ReferenceRecorder(known)
    _find_inputs(stage.module, stage.config, recorder)
    return recorder.keys


def _find_inputs(module: StageModule, config: msgspec.Struct, artifacts: Artifacts) -> tuple[Any, Any]:
    """Return a stage's table with the keys resolved that depend on other files and stages, and its inputs."""
    resolved = getattr(module, "resolve", lambda config, _: config)(config, artifacts)
    return resolved, module.Inputs.of(resolved, artifacts)


def _changed_keys(stage: Stage) -> set[str]:
    """Return the keys of a stage's table whose values differ from the default."""
    default = stage.module.Config()
    return {key for key in default.__struct_fields__ if getattr(stage.config, key) != getattr(default, key)}


def _follow_readers(workflow: Workflow) -> None:
    """Resolve keys of stages that depend on the tables that name them as `input`."""
    known = Known()
    for one in workflow.stages:
        known.add(one.task, one.config)
    readers: dict[str, list[msgspec.Struct]] = {}
    for one in workflow.stages:
        readers.setdefault(known.resolved(getattr(one.config, "input", "")), []).append(one.config)
    for one in workflow.stages:
        if follow := getattr(one.module, "follow", None):
            one.config = follow(one.config, one.task, readers.get(one.task, []), known, workflow.disk)


def resolved_toml(workflow: Workflow) -> str:
    """Return the workflow as TOML with every default written out."""
    import tomli_w

    document: dict[str, Any] = {
        "workflow": msgspec.to_builtins(workflow.settings),
        "tracking": msgspec.to_builtins(workflow.tracking),
    }
    if store := of_text(workflow.text):
        document["store"] = msgspec.to_builtins(store)
    for one in workflow.stages:
        table = msgspec.to_builtins(one.config)
        if one.variant:
            document.setdefault(one.name, []).append({"name": one.variant} | table)
        else:
            document[one.name] = table
    return tomli_w.dumps(document)
