"""Codes that a method learned on a whole model, in files until the artifact is written.

A method that trains the whole model cannot be resumed in the middle, but its result outlives a run that ends while the
model is written and measured, which takes minutes for a large one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import msgspec

from mlxflow.messages import terminal
from mlxflow.quantization.codec import Packed
from mlxflow.storage import atomic_folders, state_files, temporary_files, tensor_writing
from mlxflow.storage.digests import digest_file
from mlxflow.storage.state_files import InvalidStateError

_FOLDER, _CODES, _FACTS = "learned", "codes.safetensors", "facts.json"


class LearnedCodes(NamedTuple):
    """The result of a method: codes by module path, and figures of its training."""

    packed: dict[str, Packed]
    figures: tuple[float, ...] = ()


class _LearnedFacts(msgspec.Struct):
    """The contents of the file beside the codes.

    Attributes:
        identity: of everything that the codes depend on.
        digest: of the file of the codes.
        figures: see `LearnedCodes`.
    """

    identity: str
    digest: str
    figures: tuple[float, ...]


def learned_once(folder: Path, identity: str, learn: Callable[[], LearnedCodes], *, task: str) -> LearnedCodes:
    """Return what an interrupted run with the same settings learned; if there was none, learn it and write it.

    Args:
        folder: of this run only, for a folder of files.
        identity: of everything that the result depends on: other codes are not taken.
        learn: computes the result.
        task: the stage, for messages.

    Raises:
        StageError: the disk is full or cannot be written.
    """
    folder = folder / _FOLDER
    try:
        kept = _read(folder, identity)
    except InvalidStateError as error:
        state_files.say_ignored(folder / _FACTS, error, "The layers are learned again.")
        kept = None
    if kept is not None:
        terminal.say(f"{task}: takes the layers that an interrupted run learned ({folder / _CODES})")
        return kept
    learned = learn()
    _write(folder, identity, learned)
    return learned


def has_learned(folder: Path) -> bool:
    """Return whether an interrupted run has learned all layers; its files are not read."""
    return (folder / _FOLDER / _FACTS).is_file()


def _write(folder: Path, identity: str, learned: LearnedCodes) -> None:
    with atomic_folders.writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _CODES
        temporary = temporary_files.beside(file, ".tmp.safetensors")
        tensors = {
            f"{path}.{name}": part
            for path, codes in learned.packed.items()
            for name, part in codes._asdict().items()
            if part is not None
        }
        tensor_writing.write_tensors(temporary, tensors, {})
        digest = digest_file(temporary).content
        temporary.replace(file)
        facts = msgspec.structs.asdict(_LearnedFacts(identity, digest, learned.figures))
        atomic_folders.write_whole(folder / _FACTS, state_files.encode(facts))


def _read(folder: Path, identity: str) -> LearnedCodes | None:
    """Return the stored result; None if there is none of the same identity.

    Raises:
        InvalidStateError: a file is damaged.
    """
    try:
        facts = msgspec.convert(state_files.read(folder / _FACTS), _LearnedFacts)
        if facts.identity != identity:
            return None
        if digest_file(folder / _CODES).content != facts.digest:
            raise InvalidStateError(f"{_CODES} is not what was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidStateError(str(error)) from error
    tensors: dict[str, mx.array] = mx.load(str(folder / _CODES))  # type: ignore[assignment]
    paths = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    packed = {
        path: Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
        for path in paths
    }
    return LearnedCodes(packed, facts.figures)
