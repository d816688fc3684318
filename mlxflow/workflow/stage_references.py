"""References between stages: what they mean, which stages a workflow needs for them, and in which order.

A table names another stage as `stage` or `stage:variant`. The stages of a workflow form a graph by these references;
`ReferenceRecorder` reads them from the tables before any file is looked up.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlxflow.data.sources import Corpus
from mlxflow.storage import layout
from mlxflow.storage.toml_tables import Problem, toml_value
from mlxflow.workflow.stage import Artifacts, Beside, model_files_of, names_stage, token_stage


class Known:
    """The stages and variants that a stage may read from.

    Attributes:
        makers: by task, the names of the files that each makes.
        tables: by task, their resolved tables.
        nameable: by task, the files of each stage that a message may propose, built or not.
        planned: names of the stages that are built without those that are being resolved; None if there is no plan yet.
    """

    def __init__(self) -> None:
        self.makers: dict[str, Set[str]] = {}
        self.tables: dict[str, msgspec.Struct] = {}
        self.nameable: dict[str, Set[str]] = {}
        self.planned: Set[str] | None = None
        self._variants: dict[str, list[str]] = {}

    def add(self, task: str, table: msgspec.Struct, files: Set[str] = frozenset()) -> None:
        """Add a stage or variant.

        Args:
            task: its name.
            table: its table.
            files: the names of the files that it makes.
        """
        self.makers[task] = self.nameable[task] = files
        self.tables[task] = table
        name, _, variant = task.partition(":")
        if variant:
            self._variants.setdefault(name, []).append(task)

    def variants(self, name: str) -> list[str]:
        """Return the variants of a stage, in the order of the file."""
        return self._variants.get(name, [])

    def resolved(self, reference: str) -> str:
        """Return the stage or variant of a reference; a stage's name may stand for its only variant."""
        variants = self.variants(reference)
        return variants[0] if len(variants) == 1 and reference not in self.makers else reference

    def first(self, reference: str) -> str:
        """Return the first variant for the name of a stage with several; else the reference itself."""
        variants = self.variants(reference)
        return variants[0] if len(variants) > 1 else reference

    def is_planned(self, stage: str) -> bool:
        """Return whether a stage, or a variant of it, is built; every one is as long as there is no plan."""
        return self.planned is None or stage in self.planned

    def table(self, reference: str) -> msgspec.Struct | None:
        """Return the table of a stage or variant; None if there is none."""
        return self.tables.get(self.resolved(reference))

    def matching(self, name: str) -> list[str]:
        """Return what `name:*` stands for: all variants of a stage, or the stage itself where it has none."""
        return [name] if name in self.makers else self.variants(name)


def tokenizer_origin(name: str, known: Known | Artifacts) -> str:
    """Return where the tokenizer of a model comes from: a stage that trains one, a folder or one of the hub.

    Args:
        name: of the model or tokenizer: a stage, a folder or one of the hub.
        known: has the tables of all stages; those with a tokenizer have `tokenizer_source`, or `input`.
    """
    passed: set[str] = set()
    while names_stage(name) and name not in passed:
        passed.add(name)
        table = known.table(name)
        if not (source := getattr(table, "tokenizer_source", getattr(table, "input", ""))):
            break
        name = source
    return name


def trained_length(name: str, known: Known | Artifacts) -> tuple[str, int | Literal["auto"] | None]:
    """Return where the weights of a model come from, and the tokens of a row of the training that made them.

    Args:
        name: of the model: a stage, a folder or one of the hub.
        known: the tables of all stages.

    Returns:
        the folder or the name of the hub, and None; or nothing, and the `context_length` of a new model's tokens.
    """
    passed: set[str] = set()
    while names_stage(name) and name not in passed and (table := known.table(name)) is not None:
        passed.add(name)
        made: Any = table
        model = getattr(made, "model", "")
        base = getattr(model, "from_", model)
        if base:
            name = base
        elif hasattr(model, "from_"):
            return "", getattr(known.table(made.input), "context_length", None)
        else:
            name = made.input
    return ("", None) if names_stage(name) else (name, None)


def new_architecture(name: str, known: Known | Artifacts) -> str:
    """Return the architecture of a model that a stage trains from scratch; empty for others.

    Args:
        name: of the model: a stage, a folder or one of the hub.
        known: the tables of all stages.
    """
    passed: set[str] = set()
    while names_stage(name) and name not in passed and (table := known.table(name)) is not None:
        passed.add(name)
        made: Any = table
        model: Any = getattr(made, "model", "")
        if hasattr(model, "architecture") and not model.from_:
            return str(model.architecture)
        name = getattr(model, "from_", model) or made.input
    return ""


def tokens_of_model(quantized: Any, artifacts: Artifacts) -> str:
    """Return the pretokenize stage whose tokens the model of a quantize stage was trained on; empty for a folder.

    Args:
        quantized: the table, with `model`, `input` and its own `token_stage`.
        artifacts: the tables of the workflow.
    """
    table = artifacts.table(quantized.model or quantized.input)
    return str(quantized.token_stage) if table is None else token_stage(table)


def note_other_model(model: str, tokens: str, artifacts: Artifacts) -> None:
    """Note a model of another stage that does not fit the tokens: another tokenizer, or fewer positions than a row has.

    Of folders it is found at run.

    Args:
        model: where training starts from: a stage, a folder or one of the hub.
        tokens: the pretokenize stage.
        artifacts: the tables of the workflow.
    """
    if not names_stage(model) or artifacts.table(model) is None:  # a mistyped name is reported as one
        return
    length, row = trained_length(model, artifacts)[1], getattr(artifacts.table(tokens), "context_length", None)
    if isinstance(length, int) and isinstance(row, int) and length < row:
        expected = f"is made for {length:,} positions, and the rows of {tokens} have {row:,}"
        artifacts.note(Problem("model.from", model, expected, f"Lower {tokens}.context_length."))
    own, its = tokenizer_origin(tokens, artifacts), tokenizer_origin(model, artifacts)
    are_folders = not names_stage(own) and not names_stage(its)
    if own == its or are_folders or artifacts.table(own) is artifacts.table(its):
        return
    expected = f"has the tokenizer of {its}, and its tokens are made with that of {own}"
    advice = f"Set {tokens}.tokenizer.from = {toml_value(its)}, or read tokens of another stage."
    artifacts.note(Problem("model.from", model, expected, advice))


def model_inputs(model: Any, artifacts: Artifacts) -> tuple[tuple[Path, ...], tuple[Beside, ...]]:
    """Return the files of the model to start from, and the artifact folder whose other files are read, too.

    Args:
        model: has `from_`, a stage, a folder or one of the hub, and `trust_remote_code`.
        artifacts: finds the files.
    """
    if folder := artifacts.stage_of(model.from_, "model.from"):
        return model_files_of(folder), (Beside(folder),)
    return artifacts.model(model.from_, "model.from", trusts_code=model.trust_remote_code), ()


class ReferenceRecorder:
    """Records which stages a table names; answers everything else as if there were no files.

    It stands in for the argument of `Inputs.of`, see `mlxflow.workflow.stage.Artifacts`.

    Args:
        known: every stage and variant that may be named.

    Attributes:
        keys: by task, the key of the table that names it first, and the text written there.
    """

    def __init__(self, known: Known) -> None:
        self._known = known
        self.keys: dict[str, tuple[str, str]] = {}

    def folder(self, reference: str, key: str) -> Path:
        """Record a reference."""
        task = self._known.resolved(reference)
        if task in self._known.makers:
            self.keys.setdefault(task, (key, reference))
        return layout.stage_folder(task)

    def stage_of(self, name: str, key: str) -> Path | None:
        """Record a reference if the text has the form of one."""
        return self.folder(name, key) if names_stage(name) else None

    def is_planned(self, stage: str) -> bool:
        """Return whether a stage, or a variant of it, is built."""
        return self._known.is_planned(stage)

    def table(self, reference: str) -> msgspec.Struct | None:
        """Return the table of a stage or variant, with its defaults not resolved."""
        return self._known.table(reference)

    def first(self, reference: str) -> str:
        """Return the first variant for the name of a stage with several; else the reference itself."""
        return self._known.first(reference)

    def expand(self, references: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Return the references without wildcards: `stage:*` is what the workflow has, and makes it need nothing."""
        return tuple(one for one in references if not one.endswith(":*"))

    def makers(self) -> Mapping[str, Set[str]]:
        """Return nothing: who reads whatever there is needs nothing."""
        return {}

    def sources(self, patterns: tuple[str, ...], key: str) -> tuple[Path | Corpus, ...]:
        """Return no files."""
        return ()

    def files(self, names: tuple[str, ...], key: str) -> tuple[Path, ...]:
        """Return no files."""
        return ()

    def checked_file(self, name: str, key: str, mistakes: Callable[[Path, str], Iterable[str]]) -> Path | None:
        """Return no file, and look into none."""
        return None

    def tokenizer(self, name: str, key: str, *, trusts_code: bool) -> tuple[Path, ...]:
        """Return no files."""
        return ()

    def model(self, name: str, key: str, *, trusts_code: bool, needs_tokenizer: bool = False) -> tuple[Path, ...]:
        """Return no files."""
        return ()

    def kind_of_model(self, name: str) -> Literal["dense", "quantized", "hub", "unknown"]:
        """Return "unknown": no folder is looked up."""
        return "unknown"

    def model_type(self, name: str) -> str:
        """Return nothing: no folder is looked up."""
        return ""

    def require_package(self, package: str, key: str, value: str) -> None:
        """Ignore it; a missing package is reported when the stage is resolved."""

    def note(self, problem: Problem) -> None:
        """Ignore a mistake; it is reported when the stage is resolved."""


class CycleError(Exception):
    """Stages that read from one another in a circle.

    Attributes:
        tasks: of the circle, each reading from the next; the first one is repeated at the end.
    """

    def __init__(self, tasks: list[str]) -> None:
        super().__init__(" -> ".join(tasks))
        self.tasks = tasks


def ordered(reads: Mapping[str, Iterable[str]]) -> list[str]:
    """Return tasks so that each comes after the ones it reads from, else in the given order.

    Args:
        reads: by task, the tasks that it reads from.

    Raises:
        CycleError: some read from one another in a circle.
    """
    position = {task: number for number, task in enumerate(reads)}
    waiting = {task: set(read) for task, read in reads.items()}
    readers: dict[str, list[str]] = {}
    for task, read in waiting.items():
        for one in read:
            readers.setdefault(one, []).append(task)
    ready = [position[task] for task, read in waiting.items() if not read]
    names, order = list(reads), []
    while ready:
        task = names[heapq.heappop(ready)]
        order.append(task)
        for reader in readers.get(task, ()):
            waiting[reader].discard(task)
            if not waiting[reader]:
                heapq.heappush(ready, position[reader])
    if len(order) < len(names):
        raise CycleError(_circle(waiting, set(names) - set(order)))
    return order


def _circle(waiting: Mapping[str, Set[str]], left: Set[str]) -> list[str]:
    """Return a circle among tasks that all wait for another one of them."""
    task = next(one for one in waiting if one in left)
    path: list[str] = []
    while task not in path:
        path.append(task)
        task = min(waiting[task])
    circle = path[path.index(task) :]
    return [*circle, circle[0]]


def upstream(roots: Iterable[str], reads: Mapping[str, Iterable[str]]) -> set[str]:
    """Return tasks with everything that they read from, directly or through others.

    Args:
        roots: the tasks.
        reads: by task, the tasks that it reads from.
    """
    found: set[str] = set()
    left = list(roots)
    while left:
        task = left.pop()
        if task not in found:
            found.add(task)
            left += reads[task]
    return found


def kind_made(table: Any, artifacts: Any) -> Literal["dense", "quantized", "hub", "unknown"]:
    """Return the kind of weights that a stage makes, by its table; "unknown" for a stage that makes no model.

    Args:
        table: its table, with a method `kind_made` if it makes a model; or None.
        artifacts: see `mlxflow.workflow.stage.Artifacts`.
    """
    made: Literal["dense", "quantized", "hub", "unknown"] = (
        table.kind_made(artifacts) if hasattr(table, "kind_made") else "unknown"
    )
    return made
