"""The contract of a stage module, and helpers. Reads no files, starts no processes, knows no doit.

A stage is a module with five names; its file name is the TOML table, the doit task, the command's argument and the
artifact folder, and the first line of its docstring is what `doit list` prints:

    VERSION   a whole number, raised when artifacts of earlier code are no longer valid
    Config    a frozen msgspec struct: keys, types, ranges, defaults, help
    Inputs    a frozen msgspec struct of the paths the stage reads, made by its class method `of`
    Outputs   a frozen msgspec struct of the file names the stage writes into its artifact folder; a class method `of`
              may make it from the Config
    run       the function that does the work and returns the figures for the report, a struct of
              `mlxflow/report/stage_reports`; heavy imports happen inside it

It may have twelve more:

    resolve(config, artifacts)       returns the table with defaults filled in that depend on other files
    follow(config, task, readers, known, disk)
                                     returns it with defaults filled in that depend on the tables of its readers
    FOLLOWS              names of stages: if the workflow builds one of them, the defaults of this stage's table make it
                         build no others, see `Artifacts.is_planned`
    most_ranks(config)               returns how many processes may share its training; 0 if it does not train
    trains_adapters(config)          beside most_ranks: returns whether it trains adapters beside frozen weights
    DEVICE_BOUND = True              the artifact describes the machine it was made on
    USES_DEVICE = False              the stage does not compute on MLX's device
    ONLY_IF_WRITTEN = True           a workflow file that names no stage, so that all are built, does not build it
    EXECUTION_ONLY_KEYS              keys that do not affect the result: a change of one does not make the artifact
                                     stale
    LATER_KEYS                       dotted keys that were added after artifacts were made, with their defaults: a key
                                     with its default is not recorded, so that those artifacts stay fresh
    COPIED_TO_ARTIFACTS_ROOT         outputs that are copied to the artifacts folder, if the stage has no variants
    SHOWS_NAME = True                the workflow's name is part of the output
    SHOWS_TIMES = True               the output shows measurements of other stages: equal runs make different ones

All paths in `Inputs` are relative to the workflow's folder, so that a record of them can move between machines.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec

from mlxflow.data.sources import Corpus
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import layout
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import ModelFolder
from mlxflow.storage.toml_tables import Problem

if TYPE_CHECKING:
    from mlxflow.storage.report_structs import StageReport

#: A variant's name is a folder name and a part of a task's name.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: What messages call the setting of the most memory that MLX may hold.
MEMORY_LIMIT_KEY = "workflow.memory_limit"

#: The stages whose artifact has a tokenizer, and of most a model: they may be named where a folder is expected.
FOLDER_STAGES = ("pretokenize", "train", "quantize")

T = TypeVar("T", bound=msgspec.Struct)


class Beside(NamedTuple):
    """The files beside the model in an artifact's folder, which are known only after it is built.

    Found by `mlxflow.storage.model_files.beside`.
    """

    folder: Path


class Artifacts(Protocol):
    """The argument of `Inputs.of`: resolves references of a stage's table to files."""

    def folder(self, reference: str, key: str) -> Path:
        """Return the artifact folder of `stage` or `stage:variant`; an invalid reference is noted as a problem."""
        ...

    def stage_of(self, name: str, key: str) -> Path | None:
        """Return the artifact folder of the stage that a text names; None if it names a folder or one of the hub."""
        ...

    def first(self, reference: str) -> str:
        """Return the first variant for the name of a stage with several; else the reference itself."""
        ...

    def is_planned(self, stage: str) -> bool:
        """Return whether the workflow builds a stage, or a variant of it, also without the table that asks."""
        ...

    def table(self, reference: str) -> msgspec.Struct | None:
        """Return the resolved table of an earlier stage or variant; None if there is none."""
        ...

    def expand(self, references: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Return references with each `stage:*` replaced by all of that stage's variants."""
        ...

    def makers(self) -> Mapping[str, Set[str]]:
        """Return every stage and variant before this one, with the names of the files it makes."""
        ...

    def sources(self, sources: tuple[str, ...], key: str) -> tuple[Path | Corpus, ...]:
        """Return the files that sources name, in a fixed order; a source without files is noted as a problem."""
        ...

    def files(self, names: tuple[str, ...], key: str) -> tuple[Path, ...]:
        """Return single files; a missing one is noted as a problem."""
        ...

    def checked_file(self, name: str, key: str, mistakes: Callable[[Path, str], Iterable[str]]) -> Path | None:
        """Return a file that is looked into while the workflow is resolved, and again whenever it changes.

        Args:
            name: as written.
            key: of the stage's table; a missing file is noted as its problem.
            mistakes: takes the file's path and name, and yields finished lines about what is wrong in it.
        """
        ...

    def tokenizer(self, name: str, key: str, *, trusts_code: bool) -> tuple[Path, ...]:
        """Return the tokenizer files of a folder; none for a name on the hub.

        A folder that needs Python code of its own is noted as a problem unless that is trusted.
        """
        ...

    def model(self, name: str, key: str, *, trusts_code: bool, needs_tokenizer: bool = False) -> tuple[Path, ...]:
        """Return the files of a model folder, its configuration first; none for a name on the hub.

        A folder that needs Python code of its own is noted as a problem unless that is trusted; code of its tokenizer
        counts if the stage opens the tokenizer, too.
        """
        ...

    def kind_of_model(self, name: str) -> Literal["dense", "quantized", "hub", "unknown"]:
        """Return the kind of weights of a stage's model or of a folder; "hub" for a name of the hub."""
        ...

    def model_type(self, name: str) -> str:
        """Return the `model_type` of a model folder; empty for one of the hub, or without a valid `config.json`."""
        ...

    def require_package(self, package: str, key: str, value: str) -> None:
        """Note a problem if an optional package that a value of a key needs is not installed."""
        ...

    def note(self, problem: Problem) -> None:
        """Note a mistake in the stage's table."""
        ...


@runtime_checkable
class StageModule(Protocol):
    """The contract of every module in `mlxflow/stages`.

    It may also have `begin(config, device)`, a context manager around the run: it starts work before the device is
    selected. `device` is `workflow.device`; the value that it yields is the context's `begun`.
    """

    __name__: str
    __doc__: str | None
    VERSION: int
    Config: type[Any]
    Inputs: type[Any]
    Outputs: type[Any]

    run: Callable[..., "StageReport"]


def names_stage(text: str) -> bool:
    """Return whether a text that may name a folder names a stage or variant instead, an existing one or not."""
    return text.partition(":")[0] in FOLDER_STAGES


def follow_training(config: T, artifacts: Artifacts) -> T:
    """Return a table whose `input` and `data` name one stage each, where the workflow has several variants of them.

    Args:
        config: has `input`, a train stage, and `data`, a pretokenize stage; "train" stands for the first variant,
            "pretokenize" for the one whose tokens that was trained on.
        artifacts: the tables of the workflow.
    """
    names: Any = config
    trained = artifacts.first(names.input)
    data = names.data
    if artifacts.first(data) != data:
        data = token_stage(artifacts.table(trained)) or data
    if (trained, data) == (names.input, names.data):
        return config
    return msgspec.structs.replace(config, input=trained, data=data)


def token_stage(table: Any) -> str:
    """Return the pretokenize stage whose tokens a train or quantize stage uses; empty for none.

    Args:
        table: the stage's, or None.
    """
    found: str = getattr(table, "token_stage", getattr(table, "input", ""))
    return found


def model_files_of(folder: Path) -> tuple[Path, ...]:
    """Return the files of the model that a stage makes, its configuration first.

    Args:
        folder: its artifact.
    """
    made = ModelFolder()
    return tuple(folder / file for file in (made.config, made.model, made.tokenizer, made.tokenizer_config))


def stage_name(module: StageModule) -> str:
    """Return the name of a stage: the last part of its module's name."""
    return module.__name__.rpartition(".")[2]


def summary(module: StageModule) -> str:
    """Return the line that `doit list` prints."""
    return (module.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def outputs_of(module: StageModule, config: msgspec.Struct) -> msgspec.Struct:
    """Return the files that a stage writes with a configuration; `Outputs` may have a class method `of`."""
    make: Callable[[msgspec.Struct], msgspec.Struct] = getattr(module.Outputs, "of", lambda _: module.Outputs())
    return make(config)


def is_own_name(module: StageModule, variant: str) -> bool:
    """Return whether a variant's folder would have a reserved name, ignoring case."""
    outputs = {path.parts[0].casefold() for path in paths_of(outputs_of(module, module.Config()))}
    return variant.casefold() in outputs or variant.casefold().endswith(layout.TEMPORARY_ENDINGS)


def paths_of(struct: msgspec.Struct) -> Iterator[Path]:
    """Yield every path in a struct of inputs or outputs, in the order of its fields."""
    yield from (value for value in _values(struct) if isinstance(value, Path))


def corpora_of(struct: msgspec.Struct) -> Iterator[Corpus]:
    """Yield every input that is not a file of the project."""
    yield from (value for value in _values(struct) if isinstance(value, Corpus))


def folders_of(struct: msgspec.Struct) -> Iterator[Path]:
    """Yield the artifact folders whose files beside the model are inputs, too."""
    yield from (value.folder for value in _values(struct) if isinstance(value, Beside))


def _values(struct: msgspec.Struct) -> Iterator[object]:
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, tuple) and not isinstance(value, Corpus | Beside):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def rooted(struct: T, root: Path) -> T:
    """Return a struct of inputs or outputs with every path prefixed by a folder."""
    changes: dict[str, object] = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, Path):
            changes[name] = root / value
        elif isinstance(value, tuple) and not isinstance(value, Corpus | Beside):
            changes[name] = tuple(root / item if isinstance(item, Path) else item for item in value)
        elif isinstance(value, dict):
            changes[name] = {key: root / item for key, item in value.items()}
    return msgspec.structs.replace(struct, **changes)


def recorded_config(config: Mapping[str, Any], module: StageModule) -> dict[str, Any]:
    """Return the keys of a stage's table that the artifact depends on.

    Args:
        config: the resolved table as JSON values.
        module: the stage.
    """
    later: Mapping[str, object] = getattr(module, "LATER_KEYS", {})
    return _without(config, {**dict.fromkeys(getattr(module, "EXECUTION_ONLY_KEYS", ()), ...), **later})


def _without(table: Mapping[str, Any], left_out: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Return a table without keys that have a value, or any value where that is `...`."""
    kept = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in left_out and left_out[key] in (..., value):
            continue
        kept[name] = _without(value, left_out, f"{key}.") if isinstance(value, dict) else value
    return kept


def settings_digest(settings: dict[str, object]) -> str:
    """Return the digest of everything that a stage depends on except the content of its inputs."""
    return digest_json(settings)


def require(path: Path, task: str) -> Path:
    """Return the path of a required file of an artifact.

    Raises:
        ArtifactError: it is missing; the message names the command that makes it.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: missing. {advise_build(task)}")
    return path
