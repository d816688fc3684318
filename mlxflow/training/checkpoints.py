"""Checkpoints: all that a run needs to go on to the same bytes that it would have come to without a break.

    step-000100/state.safetensors   weights, optimizer, random state, the sums of an update that was cut short
    step-000100/state.json          step, place in the data, batch decisions, counts; what the run is of
    step-000100/metrics.jsonl       the records so far
    best-000080.safetensors         weights of the best validation so far, where they are wanted

A checkpoint takes its place whole, after every byte is on the disk.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow import artifact
from mlxflow.errors import ArtifactError

_STATE, _FACTS, _METRICS = "state.safetensors", "state.json", "metrics.jsonl"


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
        folder: where it lies.
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
        folder: of this run and no other: its name tells the settings and the inputs.
        keep: how many are kept.
        settings: what the run is of, by dotted key; to tell how another one differs.
        say: takes each line for the person who waits.
    """

    def __init__(self, folder: Path, *, keep: int, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._folder = folder
        self._keep = keep
        self._settings = json.loads(json.dumps(settings))
        self._say = say

    def save(self, name: str, arrays: Mapping[str, mx.array], facts: Mapping[str, Any], metrics: str) -> Path:
        """Write a checkpoint, then remove the oldest ones.

        Args:
            name: sorts in the order of the run, such as `000100`.
            arrays: by name; evaluated here.
            facts: JSON values.
            metrics: the records so far.

        Raises:
            StageError: the disk is full or cannot be written; the checkpoints that are there stay as they are.
        """
        folder = self._folder / f"step-{name}"
        with artifact.publishing(folder) as private:
            artifact.write_tensors(private / _STATE, arrays, {})
            artifact.check_whole(private / _STATE)
            (private / _METRICS).write_text(metrics)
            told = {"settings": self._settings, "facts": facts, "bytes": (private / _STATE).stat().st_size}
            (private / _FACTS).write_text(json.dumps(told))
        for old in self._folders()[: -self._keep]:
            shutil.rmtree(old)
        return folder

    def latest(self) -> Checkpoint | None:
        """Return the last whole checkpoint; what is damaged or of another configuration is told and left alone."""
        for folder in reversed(self._folders()):
            try:
                return self._read(folder)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, ArtifactError) as error:
                self._say(f"{folder}: not a whole checkpoint ({error}); it is not used. Remove it.")
        for other in sorted(self._folder.parent.glob("*/step-*/state.json")):
            if other.parent.parent != self._folder:
                self._say(
                    f"{other.parent}: a checkpoint of another configuration ({self._difference(other)}); "
                    "it is left alone and training begins anew."
                )
        return None

    def save_best(self, step: int, weights: Mapping[str, mx.array]) -> None:
        """Keep the weights of the best validation so far; those before are kept as long as a checkpoint knows them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._best(step)
        temporary = path.with_name(f".{path.name}.tmp.safetensors")
        artifact.write_tensors(temporary, weights, {})
        artifact.check_whole(temporary)
        temporary.replace(path)
        needed = {step, *(self._best_step(folder) for folder in self._folders())}
        for old in self._folder.glob("best-*.safetensors"):
            if int(old.stem.removeprefix("best-")) not in needed:
                old.unlink()

    def read_best(self, step: int) -> dict[str, mx.array]:
        """Return the weights that were kept at a step."""
        return cast("dict[str, mx.array]", mx.load(str(self._best(step))))

    def _best(self, step: int) -> Path:
        return self._folder / f"best-{step:06}.safetensors"

    def _folders(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())

    def _read(self, folder: Path) -> Checkpoint:
        told = json.loads((folder / _FACTS).read_text())
        state = folder / _STATE
        if told["settings"] != self._settings:
            raise ValueError(f"another configuration: {self._difference(folder / _FACTS)}")
        if state.stat().st_size != told["bytes"]:
            raise ValueError(f"{_STATE} has {state.stat().st_size:,} bytes, {told['bytes']:,} were written")
        artifact.read_metadata(state)
        arrays = cast("dict[str, mx.array]", mx.load(str(state)))
        mx.eval(arrays)  # the file may be removed while the run goes on
        return Checkpoint(folder, arrays, told["facts"], (folder / _METRICS).read_text())

    def _best_step(self, folder: Path) -> int:
        try:
            return int(json.loads((folder / _FACTS).read_text())["facts"]["best_step"])
        except (OSError, ValueError, KeyError, TypeError):
            return -1

    def _difference(self, facts: Path) -> str:
        """Return in words how the settings of a checkpoint differ from this run's."""
        try:
            theirs = json.loads(facts.read_text())["settings"]
        except (OSError, ValueError, KeyError):
            return "which cannot be read"
        keys = [key for key in {**theirs, **self._settings} if theirs.get(key) != self._settings.get(key)]
        if not keys:
            return "made by another version of the stage"
        told = [f"{key}: {theirs.get(key)} -> {self._settings.get(key)}" for key in keys[:3]]
        return ", ".join(told) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
