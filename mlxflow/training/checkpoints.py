"""Checkpoints of a training run: a run that continues from one ends with the same bytes as an uninterrupted run.

    step-000100/state.safetensors   weights, optimizer, random state, the sums of an interrupted update
    step-000100/state.json          step, position in the data, batch decisions, counts; settings; digests
    step-000100/metrics.jsonl       the records so far
    best-000080.safetensors         weights of the best validation so far, if the settings ask for them

A checkpoint is moved into place after every byte is on the disk. It holds a digest of each of its files and of the best
weights that belong to it. A damaged checkpoint is reported, and the one before it is used.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import msgspec

from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.storage import atomic_folders, layout, state_files, temporary_files, tensor_writing
from mlxflow.storage.digests import digest_file
from mlxflow.storage.state_files import InvalidStateError, OutdatedStateError

_STATE, _FACTS, _METRICS = "state.safetensors", "state.json", layout.METRICS


class _Kept(msgspec.Struct):
    """The contents of `state.json`.

    Attributes:
        settings: what determines the run, by dotted key.
        facts: JSON values.
        files: digests of the other files, by name.
        best: digest of the best weights so far; empty if none were kept.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    files: dict[str, str]
    best: str


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint in a folder by its name, which is not read; 0 if there is none."""
    steps = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


class Checkpoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        folder: of the checkpoint.
        arrays: by name.
        facts: JSON values.
        metrics: the records so far, as written.
    """

    folder: Path
    arrays: dict[str, mx.array]
    facts: dict[str, Any]
    metrics: str


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: of this run only; its name follows from settings and inputs.
        keep: number of checkpoints kept.
        settings: what determines the run, by dotted key; compared with those of other checkpoints.
        say: prints a line for the user.
        is_read_only: whether nothing is written: of the ranks of a distributed run only the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
        is_read_only: bool = False,
    ) -> None:
        self._is_read_only = is_read_only
        self._folder = folder
        self._keep = keep
        self._settings = json.loads(json.dumps(settings))
        self._say = say
        self._best_digests: dict[int, str] = {}

    def save(self, name: str, arrays: Mapping[str, mx.array], facts: Mapping[str, Any], metrics: str) -> Path:
        """Write a checkpoint, then remove the oldest ones.

        Args:
            name: sorts in the order of the run, such as `000100`.
            arrays: by name; evaluated here.
            facts: JSON values.
            metrics: the records so far.

        Raises:
            StageError: the disk is full or cannot be written; existing checkpoints are kept.
        """
        folder = self._folder / f"step-{name}"
        if self._is_read_only:
            return folder
        with atomic_folders.publishing(folder) as private:
            tensor_writing.write_tensors(private / _STATE, arrays, {})
            tensor_writing.check_whole(private / _STATE)
            (private / _METRICS).write_text(metrics)
            files = {name: digest_file(private / name).content for name in (_STATE, _METRICS)}
            best = self._best_digests.get(facts.get("best_step", -1), "")
            contents = _Kept(self._settings, dict(facts), files, best)
            (private / _FACTS).write_bytes(state_files.encode(msgspec.structs.asdict(contents)))
        for old in self._folders()[: -self._keep]:
            shutil.rmtree(old)
        return folder

    def latest(self, unfit: Callable[[Checkpoint], str] = lambda checkpoint: "") -> Checkpoint | None:
        """Return the last undamaged checkpoint that fits this run; others are reported and not touched.

        Unfinished files of a killed run are removed.

        Args:
            unfit: returns why the run cannot continue from a checkpoint; empty if it can.
        """
        if not self._is_read_only:
            self._remove_unfinished()
        for folder in reversed(self._folders()):
            try:
                read_checkpoint = self._read(folder)
                if reason := unfit(read_checkpoint):
                    raise InvalidStateError(reason)
            except (OSError, ValueError, RuntimeError, ArtifactError) as error:
                self._say(f"{folder}: not a whole checkpoint ({error}); it is not used. Remove it.")
            else:
                return read_checkpoint
        for other in sorted(self._folder.parent.glob("*/step-*/state.json")):
            if other.parent.parent != self._folder:
                self._say(
                    f"{other.parent}: a checkpoint of another configuration ({self._other_description(other.parent)}); "
                    "it is left alone and training starts from step 0."
                )
        return None

    def _remove_unfinished(self) -> None:
        for partial in self._folder.glob(".step-*.partial*"):
            atomic_folders.remove_folder(partial)
        temporary_files.remove_orphans(self._folder)

    def save_best(self, step: int, weights: Mapping[str, mx.array]) -> None:
        """Save the weights of the best validation so far; earlier ones are kept while a checkpoint refers to them."""
        if self._is_read_only:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._best(step)
        temporary = temporary_files.beside(path, ".tmp.safetensors")
        tensor_writing.write_tensors(temporary, weights, {})
        tensor_writing.check_whole(temporary)
        self._best_digests[step] = digest_file(temporary).content
        temporary.replace(path)
        needed = {step, *(self._best_step(folder) for folder in self._folders())}
        for old in self._folder.glob("best-*.safetensors"):
            if int(old.stem.removeprefix("best-")) not in needed:
                old.unlink()

    def read_best(self, step: int) -> dict[str, mx.array]:
        """Return the weights that `save_best` saved at a step.

        Raises:
            StageError: the file is missing or damaged.
        """
        if problem := _problem(self._best(step), self._best_digests.get(step, "")):
            raise StageError(f"{self._best(step)}: {problem}. Run it again, which uses an earlier checkpoint.")
        return cast("dict[str, mx.array]", mx.load(str(self._best(step))))

    def _best(self, step: int) -> Path:
        return self._folder / f"best-{step:06}.safetensors"

    def _folders(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())

    def _read(self, folder: Path) -> Checkpoint:
        contents = _read_kept(folder)
        if contents.settings != self._settings:
            raise InvalidStateError(f"another configuration: {self._difference(contents.settings)}")
        files = {folder / name: contents.files.get(name, "") for name in (_STATE, _METRICS)}
        best_step = contents.facts.get("best_step")
        if contents.best and isinstance(best_step, int):
            files[self._best(best_step)] = self._best_digests[best_step] = contents.best
        for path, digest in files.items():
            if problem := _problem(path, digest):
                raise InvalidStateError(f"{path.name} {problem}")
        arrays = cast("dict[str, mx.array]", mx.load(str(folder / _STATE)))
        mx.eval(arrays)  # the file may be removed while the run continues
        return Checkpoint(folder, arrays, contents.facts, (folder / _METRICS).read_text())

    def _best_step(self, folder: Path) -> int:
        try:
            return int(_read_kept(folder).facts["best_step"])
        except (OSError, ValueError, LookupError, TypeError):
            return -1

    def _difference(self, theirs: Mapping[str, Any]) -> str:
        """Return in words how the settings of a checkpoint differ from those of this run."""
        keys = [key for key in {**theirs, **self._settings} if theirs.get(key) != self._settings.get(key)]
        if not keys:
            return "made by another version of the stage"
        changes = [f"{key}: {theirs.get(key)} -> {self._settings.get(key)}" for key in keys[:3]]
        return ", ".join(changes) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

    def _other_description(self, folder: Path) -> str:
        try:
            return self._difference(_read_kept(folder).settings)
        except (OSError, ValueError):
            return "which cannot be read"


def _problem(path: Path, digest: str) -> str:
    """Return why a file does not have the expected digest; empty if it has."""
    try:
        return "" if digest_file(path).content == digest else "is not what was written"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"


def _read_kept(folder: Path) -> _Kept:
    """Return the contents of a checkpoint's `state.json`.

    Raises:
        OSError: it is missing or cannot be read now.
        InvalidStateError: it is not what was written.
    """
    try:
        return msgspec.convert(state_files.read(folder / _FACTS), _Kept)
    except msgspec.ValidationError as error:
        raise InvalidStateError(f"{_FACTS}: {error}") from error
    except OutdatedStateError:
        raise InvalidStateError(f"{_FACTS} is of an earlier version") from None
    except InvalidStateError as error:
        raise InvalidStateError(f"{_FACTS}: {error}") from error
