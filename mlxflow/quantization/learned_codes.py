"""Codes that a method has learned, in files until the artifact is written: of a whole model, or block by block.

They outlive a run that ends while further blocks are learned, or while the model is written and measured, which takes
minutes for a large one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.messages import terminal
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.kept_tensors import KeptTensors, names_kept

_FOLDER, _NAME = "learned", "codes"

# The folder of blocks, of methods that learn one after the other
_BLOCKS = "blocks"

#: Names of what is learned together in a `BlockStore`: all of a model, or what is outside of its blocks.
WHOLE, OUTSIDE = "model", "outside"


class LearningFiles(NamedTuple):
    """The files of what a run learns, from which an interrupted one is resumed.

    Attributes:
        folder: for files of this run only.
        identity: of everything that they depend on.
    """

    folder: Path
    identity: str


class LearnedCodes(NamedTuple):
    """The result of a method: codes by module path, and figures of its training."""

    packed: dict[str, Packed]
    figures: tuple[float, ...] = ()


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
    store = KeptTensors(folder / _FOLDER, identity, effect="The layers are learned again.")
    if (kept := store.read(_NAME)) is not None:
        terminal.say(f"{task}: takes the layers that an interrupted run learned ({kept.file})")
        return LearnedCodes(_codes(kept.tensors), tuple(kept.facts["figures"]))
    learned = learn()
    store.write(_NAME, _tensors(learned.packed), {"figures": list(learned.figures)})
    return learned


def has_learned(folder: Path) -> bool:
    """Return whether an interrupted run has learned all layers; its files are not read."""
    return _NAME in names_kept(folder / _FOLDER)


class BlockStore:
    """What a method learns of one block after the other: tensors in files, which are read when they are used.

    Args:
        folder: of this run only, for a folder of files.
        identity: of everything that the blocks depend on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._kept = KeptTensors(folder / _BLOCKS, identity, effect="The block is learned again.")

    def codes(self, block: str) -> dict[str, Packed] | None:
        """Return the codes of a block, lazy; None if no run with the same settings learned it."""
        found = self.tensors(block)
        return None if found is None else _codes(found)

    def keep_codes(self, block: str, packed: Mapping[str, Packed]) -> dict[str, Packed]:
        """Write the codes of a block, and return them unread."""
        return _codes(self.keep(block, _tensors(packed)))

    def tensors(self, block: str) -> dict[str, mx.array] | None:
        """Return the tensors of a block, lazy; None if no run with the same settings wrote them."""
        found = self._kept.read(block)
        return None if found is None else found.tensors

    def keep(self, block: str, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Write the tensors of a block, and return them unread."""
        found: Any = mx.load(str(self._kept.write(block, tensors)))
        return dict(found)


def blocks_kept(folder: Path) -> list[str]:
    """Return the paths of the blocks that runs have learned in a folder, which may be missing."""
    return [name for name in names_kept(folder / _BLOCKS) if name not in (WHOLE, OUTSIDE)]


def blocks_folder(folder: Path) -> Path:
    """Return the folder of the files of a `BlockStore`."""
    return folder / _BLOCKS


def _tensors(packed: Mapping[str, Packed]) -> dict[str, mx.array]:
    return {
        f"{path}.{name}": part
        for path, codes in packed.items()
        for name, part in codes._asdict().items()
        if part is not None
    }


def _codes(tensors: Mapping[str, mx.array]) -> dict[str, Packed]:
    paths = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {
        path: Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
        for path in paths
    }
