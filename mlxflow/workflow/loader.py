"""The workflow: every stage of one `workflow.toml` with its settings, inputs and outputs."""

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from mlxflow.data import sources
from mlxflow.device import compute_device
from mlxflow.device.compute_device import SIZE_PATTERN
from mlxflow.errors import CallError, WorkflowError
from mlxflow.storage import layout, model_files, paths
from mlxflow.storage.digests import DigestCache
from mlxflow.workflow import stage, workflow_text
from mlxflow.workflow.config import Problem, read_struct, toml_value, unknown_key, word
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.inputs import Known, References
from mlxflow.workflow.matrix import expand_matrix
from mlxflow.workflow.stage import Corpus, StageModule

#: Every stage, in the order in which `doit list` shows them. Adding one is a file in `stages/` and its name here.
STAGES = ("pretokenize", "train", "quantize", "profile", "benchmark", "report")

#: The most files that all stages may read together, the same one counted again for each stage that reads it.
_MAX_FILES = 100_000

#: The most mistakes that are listed at once.
_MAX_LINES = 100


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[workflow]` table."""

    name: Annotated[str, Meta(min_length=1, description="shown in reports")] = "workflow"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="every random choice derives from it, by name")] = 0
    device: Annotated[Literal["auto", "gpu", "cpu"], Meta(description="what MLX computes on")] = "auto"
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=1024,
            examples=[4],
            description="threads that multiply matrices on the CPU, on which last bits depend; 0: one a processor",
        ),
    ] = 0
    memory_limit: Annotated[
        str,
        Meta(
            pattern=SIZE_PATTERN,
            examples=["12 GB"],
            description='of the device\'s recommended working set, or a size such as "12 GB"',
        ),
    ] = "80%"
    cache_limit: Annotated[
        str,
        Meta(
            pattern=rf"^$|{SIZE_PATTERN}",
            examples=["2 GB"],
            description="what MLX keeps of freed memory for reuse: of the memory limit, or a size; empty: as MLX likes",
        ),
    ] = ""
    wired_limit: Annotated[
        str,
        Meta(
            pattern=SIZE_PATTERN,
            examples=["8 GB"],
            description="what stays resident on a Mac: of the memory limit, or a size",
        ),
    ] = "100%"

    def problems(self) -> Iterator[Problem]:
        """Yield a memory limit of nothing, and limits of more than all."""
        for key in ("memory_limit", "cache_limit", "wired_limit"):
            value, default = getattr(self, key), toml_value(getattr(Settings(), key))
            if value and (expected := compute_device.size_mistake(value)):
                yield Problem(key, value, expected, f"Use {default} (the default).")
        if (
            not compute_device.size_mistake(self.memory_limit)
            and compute_device.parse_size(self.memory_limit, 10**12) == 0
        ):
            yield Problem("memory_limit", self.memory_limit, "expected more than nothing", 'Use "80%" (the default).')


class Stage:
    """One stage of a workflow, or one variant of it, ready to be asked or run.

    Attributes:
        module: the stage's module.
        variant: its name, or None.
        table: the table's key in the file, such as `train` or `quantize[0]`.
        config: the resolved table.
        inputs: what it reads; paths relative to the workflow's folder.
        spellings: see `mlxflow.storage.paths.record_name`.
    """

    def __init__(
        self, module: StageModule, variant: str | None, table: str, config: msgspec.Struct, workflow: "Workflow"
    ) -> None:
        self.module = module
        self.variant = variant
        self.table = table
        self.config = config
        self._workflow = workflow
        self.inputs: msgspec.Struct = module.Inputs()
        self.spellings: dict[str, str] = {}

    @cached_property
    def name(self) -> str:
        """The name of the TOML table."""
        return stage.stage_name(self.module)

    @cached_property
    def task(self) -> str:
        """`stage` or `stage:variant`."""
        return f"{self.name}:{self.variant}" if self.variant else self.name

    @cached_property
    def folder(self) -> Path:
        """The artifact, relative to the workflow's folder."""
        return layout.stage_folder(self.task)

    @cached_property
    def outputs(self) -> list[Path]:
        """Every file the stage writes, relative to the workflow's folder."""
        return [self.folder / path for path in stage.paths_of(stage.outputs_of(self.module, self.config))]

    @property
    def file_names(self) -> set[str]:
        """The names of the files it writes, relative to the artifact."""
        return {path.relative_to(self.folder).as_posix() for path in self.outputs}

    @cached_property
    def copies(self) -> dict[Path, Path]:
        """The output behind each copy in the folder of all artifacts; a variant has none, others would overwrite it."""
        names = () if self.variant else getattr(self.module, "LAID_ON_TOP", ())
        return {Path(layout.ARTIFACTS, name): self.folder / name for name in names}

    @cached_property
    def input_files(self) -> list[Path]:
        """Every file the stage reads, relative to the workflow's folder, each once."""
        return list(dict.fromkeys(stage.paths_of(self.inputs)))

    @cached_property
    def folders(self) -> list[Path]:
        """Every artifact folder of which what lies beside the model is read, too."""
        return list(dict.fromkeys(stage.folders_of(self.inputs)))

    def files_read(self, root: Path) -> dict[str, Path]:
        """Return every file the stage reads as of now, relative to the workflow's folder, by the name to record.

        Args:
            root: the workflow's folder.
        """
        beside = (folder / name for folder in self.folders for name in model_files.beside(root / folder))
        return {paths.record_name(path.as_posix(), self.spellings): path for path in (*self.input_files, *beside)}

    @cached_property
    def corpora(self) -> list[Corpus]:
        """Every built-in corpus the stage reads."""
        return list(stage.corpora_of(self.inputs))

    def settings(self) -> dict[str, Any]:
        """Return what the workflow file and the code say of the artifact, as JSON values."""
        config = json.loads(msgspec.json.encode(self.config))
        return {
            "version": self.module.VERSION,
            "config": {k: v for k, v in config.items() if k not in getattr(self.module, "MANNER", ())},
            "seed": self._workflow.settings.seed,
            **({"name": self._workflow.settings.name} if getattr(self.module, "SHOWS_NAME", False) else {}),
        }

    @property
    def bound_device(self) -> str | None:
        """The workflow's `device` where the artifact tells about the machine it was made on, else None."""
        return self._workflow.settings.device if getattr(self.module, "DEVICE_BOUND", False) else None

    def corpus_identities(self, cache: DigestCache) -> dict[str, str]:
        """Return the identity of every built-in corpus by its name."""
        return {corpus.name: sources.corpus_identity(corpus.name, cache) for corpus in self.corpora}


class Workflow:
    """A workflow file, read and checked.

    Attributes:
        path: the file.
        root: its folder, from which every relative path begins.
        settings: the `[workflow]` table.
        stages: every stage and variant, each after the ones it reads from.
        left_out: by name, why a stage that the file does not mention is not among them: lines for people.
        disk: every question that was asked of the disk to find the stages' inputs, with its answer.
    """

    def __init__(self, path: Path, settings: Settings, disk: Disk) -> None:
        self.path = path
        self.root = path.parent
        self.disk = disk
        self.settings = settings
        self.stages: list[Stage] = []
        self.left_out: dict[str, list[str]] = {}

    @property
    def artifacts(self) -> Path:
        """The folder of all artifacts."""
        return layout.artifacts_folder(self.root)

    @property
    def state(self) -> Path:
        """The folder for what is remembered between runs."""
        return layout.state_folder(self.root)

    def members(self) -> tuple[stage.Made, ...]:
        """Return every stage as others see it; asked when all stages are known."""
        return self._members

    @cached_property
    def _members(self) -> tuple[stage.Made, ...]:
        makers = {path: one.task for one in self.stages for path in one.outputs}
        return tuple(
            stage.Made(
                one.task,
                one.folder,
                tuple(dict.fromkeys(makers[path] for path in one.input_files if path in makers)),
                tuple(one.outputs),
            )
            for one in self.stages
        )

    def trusts_code(self, one: Stage) -> bool:
        """Return whether a stage may run Python code of model folders: its table says so, or one of those it reads."""
        return one.task in self._trusting

    @cached_property
    def _trusting(self) -> set[str]:
        found: set[str] = set()
        for one, member in zip(self.stages, self._members, strict=True):  # each after the ones it reads from
            if getattr(one.config, "trusts_code", False) or not found.isdisjoint(member.reads):
                found.add(one.task)
        return found

    @cached_property
    def _by_name(self) -> dict[str, list[Stage]]:
        found: dict[str, list[Stage]] = {}
        for one in self.stages:
            for name in {one.task, one.name}:
                found.setdefault(name, []).append(one)
        return found

    def find(self, task: str) -> Stage:
        """Return the stage of a name such as `train` or `quantize:q4`; a stage's name means its only variant, too.

        Raises:
            CallError: there is none; the message lists those there are.
        """
        named = self._by_name.get(task, [])
        exact = [one for one in named if one.task == task]
        if exact or len(named) == 1:
            return (exact or named)[0]
        if task in self.left_out:
            raise CallError(*self.left_out[task])
        known = ", ".join(one.task for one in self.stages)
        raise CallError(f"{task}: no such stage in {self.path}. Known: {known}.")


def load_workflow(path: Path, disk: Disk | None = None, data: bytes | None = None) -> Workflow:
    """Read and check a workflow file; imports no mlx.

    Args:
        path: the TOML file.
        disk: answers what is asked of the other files; None for those that are there now.
        data: what the file holds; None reads it.

    Raises:
        WorkflowError: the file is missing, no valid TOML, in a folder that cannot be used, or has mistakes: one line
            for each of them.
    """
    shown = shown_path(path)
    document = workflow_text.read(path, shown, data)
    return _Loader(shown, document).load(path, disk or Disk(path.parent))


def shown_path(path: Path) -> str:
    """Return a path as a user would write it, on one line."""
    relative = os.path.relpath(path)
    return paths.printable(str(path) if relative.startswith("..") else relative)


class _Loader:
    """Turns a parsed document into a workflow, collecting a line for every mistake on the way."""

    def __init__(self, shown: str, document: dict[str, Any]) -> None:
        self.shown = shown
        self.document = document
        self.told: dict[str, list[str]] = {name: [] for name in (*document, *STAGES)}  # by table, in the file's order
        self.modules = {name: cast("StageModule", importlib.import_module(f"mlxflow.stages.{name}")) for name in STAGES}

    def load(self, path: Path, disk: Disk) -> Workflow:
        settings = Settings()
        read: dict[str, list[tuple[str | None, str, msgspec.Struct]]] = {}
        for name, table in self.document.items():
            if name == "workflow":
                settings = read_struct(table, Settings, file=self.shown, key=name, lines=self.told[name]) or settings
            elif name in STAGES:
                read[name] = list(self._variants(name, table))
            else:
                guesses = len(self.told) < _MAX_LINES
                self.told[name].append(unknown_key(name, ["workflow", *STAGES], file=self.shown, guesses=guesses))
        workflow = Workflow(path, settings, disk)
        for name in STAGES:
            for variant, table_, config in read.get(name) or [(None, name, self.modules[name].Config())]:
                workflow.stages.append(Stage(self.modules[name], variant, table_, config, workflow))
        _follow_readers(workflow)
        self._resolve(workflow, {name for name, made in read.items() if not made})
        if any(self.told.values()):
            raise WorkflowError(*self._lines())
        return workflow

    def _lines(self) -> list[str]:
        """Return the lines for all mistakes, or for the first ones of very many."""
        lines = [line for lines in self.told.values() for line in lines]
        more = len(lines) - _MAX_LINES
        listed = lines[:_MAX_LINES]
        return [*listed, f"{self.shown}: {more:,} more mistakes. Mend these first."] if more > 0 else listed

    def _variants(self, name: str, table: object) -> Iterator[tuple[str | None, str, msgspec.Struct]]:
        tables = table if isinstance(table, list) else [table]
        seen: dict[str, str] = {}
        lines = self.told[name]
        if not tables:
            lines.append(f"{self.shown}: {name} = []: expected a table. Write [{name}] or remove the key.")
        for index, written in enumerate(tables):
            key = f"{name}[{index}]" if isinstance(table, list) else name
            problems: list[Problem] = []
            if isinstance(table, list) and not isinstance(written, dict):
                advice = f"Write [[{name}]] on a line of its own and its keys below it."
                lines.append(word(Problem("", written, "expected a table", advice), self.shown, key))
                continue
            for one in list(expand_matrix(written, problems)) if isinstance(written, dict) else [written]:
                variant = one.get("name") if isinstance(one, dict) else None
                rest = {k: v for k, v in one.items() if k != "name"} if isinstance(one, dict) else one
                if (variant is not None or isinstance(table, list)) and not self._check_name(key, name, variant, seen):
                    variant = None
                config = read_struct(rest, self.modules[name].Config, file=self.shown, key=key, lines=lines)
                if config is not None:
                    yield variant, key, config
            lines += [word(problem, self.shown, key) for problem in problems]

    def _check_name(self, key: str, table: str, variant: object, seen: dict[str, str]) -> bool:
        if variant is None:
            problem = Problem("name", msgspec.UNSET, "missing", f'Each [[{table}]] needs one, such as name = "q4".')
        elif not isinstance(variant, str) or not re.fullmatch(stage.NAME_PATTERN, variant):
            problem = Problem(
                "name", variant, "expected letters, digits, '.', '_' and '-', at most 64", 'Write one such as "q4".'
            )
        elif stage.is_own_name(self.modules[table], variant):
            problem = Problem("name", variant, "is how mlxflow names a file or folder of its own", "Write another one.")
        elif variant.casefold() in seen:  # one folder on a Mac
            other = seen[variant.casefold()]
            twice = variant == other
            expected = f"named twice in [[{table}]]" if twice else f"differs only by case from {toml_value(other)}"
            problem = Problem("name", variant, expected, "Give each variant a name of its own.")
        else:
            seen[variant.casefold()] = variant
            return True
        if (line := word(problem, self.shown, key)) not in self.told[table]:
            self.told[table].append(line)
        return False

    def _resolve(self, workflow: Workflow, unread: set[str]) -> None:
        """Find every stage's inputs; leave out stages that the file does not mention and whose defaults do not fit.

        Args:
            workflow: its stages are changed.
            unread: stages that stand in for tables of which nothing could be read; nobody wrote what they ask for.
        """
        broken = {name for name in STAGES if self.told[name]}
        num_files = 0
        for name in STAGES:
            before = [one for one in workflow.stages if STAGES.index(one.name) < STAGES.index(name)]
            known = Known({one.task: one.file_names for one in before}, {one.task: one.config for one in before})
            is_written = name in self.document
            for one in [one for one in workflow.stages if one.name == name and name not in unread]:
                lines = self.told[name] if is_written else []
                asked = References(workflow.disk, known, broken, workflow.left_out.keys(), self.shown, one.table, lines)
                one.config = getattr(one.module, "resolve", lambda config, _: config)(one.config, asked)
                one.inputs = one.module.Inputs.of(one.config, asked)
                one.spellings = asked.spellings
                num_files += len(one.input_files)
                if num_files > _MAX_FILES:
                    raise WorkflowError(
                        f"{self.shown}: {one.table}: the stages up to here read {num_files:,} files: "
                        f"expected at most {_MAX_FILES:,}. Let fewer variants read many files, or split the workflow."
                    )
                asked.check_makers(one.input_files, _changed_keys(one))
                if lines and not is_written:
                    workflow.left_out[name] = lines
                    workflow.stages.remove(one)


def _changed_keys(one: Stage) -> set[str]:
    """Return the keys of a stage's table of which the value is not the default."""
    default = one.module.Config()
    return {key for key in default.__struct_fields__ if getattr(one.config, key) != getattr(default, key)}


def _follow_readers(workflow: Workflow) -> None:
    """Let stages make choices that follow from the tables that name them as their `input`."""
    readers: dict[str, list[msgspec.Struct]] = {}
    for one in workflow.stages:
        readers.setdefault(getattr(one.config, "input", ""), []).append(one.config)
    counts = Counter(one.name for one in workflow.stages)
    for one in workflow.stages:
        follow = getattr(one.module, "follow", None)
        if follow is None:
            continue
        names = dict.fromkeys([one.task, one.name] if counts[one.name] == 1 else [one.task])
        one.config = follow(one.config, [reader for name in names for reader in readers.get(name, [])], workflow.disk)


def resolved_toml(workflow: Workflow) -> str:
    """Return the workflow as a workflow file with every default written out."""
    import tomli_w

    document: dict[str, Any] = {"workflow": msgspec.to_builtins(workflow.settings)}
    for one in workflow.stages:
        table = msgspec.to_builtins(one.config)
        if one.variant:
            document.setdefault(one.name, []).append({"name": one.variant} | table)
        else:
            document[one.name] = table
    return tomli_w.dumps(document)
