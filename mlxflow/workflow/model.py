"""A loaded workflow: the `[workflow]` table, and every stage with its settings, inputs and outputs."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlxflow.data import sources
from mlxflow.data.sources import Corpus
from mlxflow.device import compute_device
from mlxflow.device.compute_device import SIZE_PATTERN
from mlxflow.distributed.table import Distributed
from mlxflow.messages.errors import CallError
from mlxflow.storage import layout, model_files, paths
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.run_context import Member
from mlxflow.storage.toml_tables import Problem, toml_value
from mlxflow.tracking.table import Tracking
from mlxflow.workflow import stage
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.handover import Basis
from mlxflow.workflow.ranks import Ranks, table_problems
from mlxflow.workflow.stage import StageModule
from mlxflow.workflow.stage_node import Node


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[workflow]` table."""

    name: Annotated[str, Meta(min_length=1, description="shown in reports")] = "workflow"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="every random choice derives from it, by name")] = 0
    device: Annotated[Literal["auto", "gpu", "cpu"], Meta(description="the device that MLX uses")] = "auto"
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=1024,
            examples=[4],
            description="threads of matrix products on the CPU, which determine last bits; 0: one per processor",
        ),
    ] = 0
    memory_limit: Annotated[
        str,
        Meta(
            pattern=SIZE_PATTERN,
            examples=["12 GB"],
            description='share of the device\'s recommended working set, or a size such as "12 GB"',
        ),
    ] = "80%"
    cache_limit: Annotated[
        str,
        Meta(
            pattern=rf"^$|{SIZE_PATTERN}",
            examples=["2 GB"],
            description="freed memory kept for reuse: share of the memory limit, or a size; empty: MLX's default",
        ),
    ] = ""
    wired_limit: Annotated[
        str,
        Meta(
            pattern=SIZE_PATTERN,
            examples=["8 GB"],
            description="memory that stays resident on a Mac: share of the memory limit, or a size",
        ),
    ] = "100%"
    stages: Annotated[
        tuple[str, ...],
        Meta(
            description="stages or variants that are built, with those that they read from; "
            "empty: those that have a table in this file, or all stages if none has"
        ),
    ] = ()
    distributed: Annotated[
        Distributed, Meta(description="processes that train a model together; how many changes no artifact")
    ] = Distributed()

    def problems(self) -> Iterator[Problem]:
        """Yield sizes and times out of range, and what `[workflow.distributed]` contradicts."""
        yield from table_problems(self.distributed, self.device)
        for key in ("memory_limit", "cache_limit", "wired_limit"):
            value, default = getattr(self, key), toml_value(getattr(Settings(), key))
            if value and (expected := compute_device.size_mistake(value)):
                yield Problem(key, value, expected, f"Use {default} (the default).")
        if (
            not compute_device.size_mistake(self.memory_limit)
            and compute_device.parse_size(self.memory_limit, 10**12) == 0
        ):
            yield Problem("memory_limit", self.memory_limit, "expected more than 0 bytes", 'Use "80%" (the default).')


class Stage:
    """One stage of a workflow, or one variant of a stage.

    Attributes:
        module: the stage's module.
        variant: its name, or None.
        table: the table's key in the file, such as `train` or `quantize[0]`.
        config: the resolved table.
        inputs: the files it reads; paths relative to the workflow's folder.
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
        """The output of each copy in the artifacts folder; variants have no copies, which would collide."""
        names = () if self.variant else getattr(self.module, "COPIED_TO_ARTIFACTS_ROOT", ())
        return {Path(layout.ARTIFACTS, name): self.folder / name for name in names}

    @cached_property
    def input_files(self) -> list[Path]:
        """Every file the stage reads, relative to the workflow's folder, each once."""
        return list(dict.fromkeys(stage.paths_of(self.inputs)))

    @cached_property
    def folders(self) -> list[Path]:
        """The artifact folders whose files beside the model are read, too."""
        return list(dict.fromkeys(stage.folders_of(self.inputs)))

    def files_read(self, root: Path) -> dict[str, Path]:
        """Return the files that the stage reads now, relative to the workflow's folder, by recorded name.

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
        """Return the settings of the workflow file and the code that the artifact depends on, as JSON values."""
        config = json.loads(msgspec.json.encode(self.config))
        return {
            "version": self.module.VERSION,
            "config": stage.recorded_config(config, self.module),
            "seed": self._workflow.settings.seed,
            **({"name": self._workflow.settings.name} if getattr(self.module, "SHOWS_NAME", False) else {}),
        }

    def node(self, command: tuple[str, ...] = (), basis: Basis | None = None) -> Node:
        """Return the stage as a node of doit's graph.

        Args:
            command: of the process that runs it.
            basis: the data that the workflow was resolved from.
        """
        settings = self._workflow.settings
        return Node(
            task=self.task,
            doc=stage.summary(self.module),
            root=self._workflow.root,
            folder=self.folder.as_posix(),
            inputs=tuple(name.as_posix() for name in self.input_files),
            outputs=tuple(name.as_posix() for name in self.outputs),
            settings=self.settings(),
            command=command,
            beside=tuple(folder.as_posix() for folder in self.folders),
            spellings=self.spellings,
            corpora=tuple(corpus.name for corpus in self.corpora),
            bound_device=self.bound_device,
            device=settings.device,
            threads=settings.threads,
            ranks=self._workflow.ranks.words if self.ranks > 1 else "",
            uses_device=getattr(self.module, "USES_DEVICE", True),
            copies={copy.as_posix(): original.as_posix() for copy, original in self.copies.items()},
            measured=tuple(
                path.as_posix() for path in (*self.input_files, *self.outputs) if path in self._workflow.measured
            ),
            basis=basis,
        )

    @property
    def ranks(self) -> int:
        """The number of processes that run it together."""
        return self._workflow.ranks.number if self.most_ranks else 1

    @property
    def most_ranks(self) -> int:
        """The most processes that can run it together; 0 for a stage that does not train."""
        return int(getattr(self.module, "most_ranks", lambda config: 0)(self.config))

    @property
    def bound_device(self) -> str | None:
        """The workflow's `device` if the artifact describes the machine it was made on, else None."""
        return self._workflow.settings.device if getattr(self.module, "DEVICE_BOUND", False) else None

    @property
    def is_measured(self) -> bool:
        """Whether its whole artifact differs between equal runs."""
        return self.bound_device is not None or getattr(self.module, "SHOWS_TIMES", False)

    def corpus_identities(self, cache: DigestCache) -> dict[str, str]:
        """Return the identity of every built-in corpus by its name."""
        return {corpus.name: sources.corpus_identity(corpus.name, cache) for corpus in self.corpora}


class Workflow:
    """A loaded and checked workflow file.

    Attributes:
        path: the file.
        root: its folder; relative paths are relative to it.
        settings: the `[workflow]` table.
        tracking: the `[tracking]` table.
        ranks: that train together.
        stages: every stage and variant, each after the ones it reads from.
        left_out: by name of a stage that others need and whose defaults do not fit, the messages that say why.
        unplanned: names of stages that the file does not ask for and that no other stage needs.
        disk: the queries of the disk made while resolving the inputs, with their answers.
        text: the content of the file.
    """

    def __init__(self, path: Path, settings: Settings, disk: Disk, text: str = "") -> None:
        self.path = path
        self.text = text
        self.root = path.parent
        self.disk = disk
        self.settings = settings
        self.tracking = Tracking()
        self.ranks = Ranks(settings.distributed, settings.device)
        self.stages: list[Stage] = []
        self.left_out: dict[str, list[str]] = {}
        self.unplanned: list[str] = []

    @property
    def artifacts(self) -> Path:
        """The folder of all artifacts."""
        return layout.artifacts_folder(self.root)

    @property
    def state(self) -> Path:
        """The folder for state that is kept between runs."""
        return layout.state_folder(self.root)

    def members(self) -> tuple[Member, ...]:
        """Return every stage with what it reads and writes; call it when all stages are known."""
        return self._members

    @cached_property
    def _members(self) -> tuple[Member, ...]:
        makers = {path: one.task for one in self.stages for path in one.outputs}
        return tuple(
            Member(
                one.task,
                one.folder,
                tuple(dict.fromkeys(makers[path] for path in one.input_files if path in makers)),
                tuple(one.outputs),
            )
            for one in self.stages
        )

    @cached_property
    def measured(self) -> frozenset[Path]:
        """The files that differ between equal runs: metrics, artifacts about the machine, and what shows them."""
        return frozenset(
            path for one in self.stages for path in one.outputs if path.name == layout.METRICS or one.is_measured
        )

    def trusts_code(self, stage: Stage) -> bool:
        """Return whether a stage, or one that it reads from, is set to run Python code of model folders."""
        return stage.task in self._trusting

    @cached_property
    def _trusting(self) -> set[str]:
        trusting: set[str] = set()
        for one, member in zip(self.stages, self._members, strict=True):  # each after the ones it reads from
            if getattr(one.config, "trusts_code", False) or not trusting.isdisjoint(member.reads):
                trusting.add(one.task)
        return trusting

    @cached_property
    def _by_name(self) -> dict[str, list[Stage]]:
        by_name: dict[str, list[Stage]] = {}
        for one in self.stages:
            for name in {one.task, one.name}:
                by_name.setdefault(name, []).append(one)
        return by_name

    def find(self, task: str) -> Stage:
        """Return the stage of a name such as `train` or `quantize:q4`; `quantize` may stand for its only variant.

        Raises:
            CallError: there is no such stage; the message lists the known ones.
        """
        named = self._by_name.get(task, [])
        exact = [one for one in named if one.task == task]
        if exact or len(named) == 1:
            return (exact or named)[0]
        if task in self.left_out:
            raise CallError(*self.left_out[task])
        if task in self.unplanned:
            raise CallError(word_unplanned(task, paths.shown(self.path), self.settings.stages))
        known = ", ".join(one.task for one in self.stages)
        raise CallError(f"{task}: no such stage in {self.path}. Known: {known}.")


def word_unplanned(task: str, shown: str, stages: tuple[str, ...]) -> str:
    """Return the message for a stage that a workflow does not build.

    Args:
        task: its name.
        shown: the workflow file's name.
        stages: `workflow.stages` as written.
    """
    if stages:
        return f"{task}: {shown} does not build it. Add {toml_value(task)} to workflow.stages."
    return f"{task}: {shown} has no [{task}] table, and no stage reads from it. Add it: its keys have defaults."
