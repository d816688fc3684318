"""The length of a training: steps, and epochs as passes over the training rows; imports no MLX."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec

from mlxflow.messages import terminal
from mlxflow.storage import tensor_header
from mlxflow.storage.toml_tables import MAX_STEPS, Problem

#: Rows in a forward pass where the table has no number: of a new model, and of one that exists.
NEW_BATCH_SIZE, PRETRAINED_BATCH_SIZE = 32, 4

T = TypeVar("T", bound=msgspec.Struct)

_TRAIN_TOKENS = "train.safetensors"

# Values of `method` in the tables `train` and `quantize` with which a model is trained
_TRAINING_METHODS = ("full", "lora", "dora", "qat")


def updates_may_grow(config: Any) -> bool:
    """Return whether later updates may sum more rows than the first one; then an epoch has no number of updates.

    Args:
        config: a `[train]` table.
    """
    return config.dynamic_batch_size and not config.constant_tokens_per_step


def length_problems(config: Any) -> Iterator[Problem]:
    """Yield steps and epochs that contradict each other, and epochs of updates whose size may change.

    Args:
        config: a `[train]` table, or another one with the same keys.
    """
    if config.num_epochs == "auto":
        return
    if config.num_steps != "auto":
        expected = f"expected without num_steps = {config.num_steps}, which says the same in updates"
        yield Problem("num_epochs", config.num_epochs, expected, "Remove one of the two.")
    elif hasattr(config, "constant_tokens_per_step") and updates_may_grow(config):
        expected = "an epoch has no fixed number of updates while constant_tokens_per_step = false lets them grow"
        yield Problem("num_epochs", config.num_epochs, expected, "Set num_steps instead, or remove the other key.")


def steps_of(num_epochs: float, *, num_rows: int, rows_per_step: int) -> int:
    """Return the updates that passes over the training rows amount to, at least one.

    The last update is rounded up: its remaining rows are the first ones of another pass.

    Args:
        num_epochs: passes over the rows.
        num_rows: of the training file.
        rows_per_step: that one update sums.
    """
    return min(MAX_STEPS, max(1, math.ceil(num_epochs * num_rows / rows_per_step - 1e-9)))


def epochs_of(num_steps: int, *, num_rows: int, rows_per_step: int) -> float:
    """Return the passes over the training rows that a number of updates amounts to.

    Args:
        num_steps: optimizer updates.
        num_rows: of the training file.
        rows_per_step: that one update sums.
    """
    return num_steps * rows_per_step / num_rows


def default_batch_size(config: Any) -> int:
    """Return the rows of a forward pass of a table without a number.

    Args:
        config: a `[train]` table, or another one with the same keys.
    """
    return PRETRAINED_BATCH_SIZE if getattr(config.model, "from_", "") else NEW_BATCH_SIZE


def batch_size_of(config: Any, num_rows: int) -> int:
    """Return the rows of a forward pass: those of the table, or all rows if there are fewer than the default.

    A written number that equals the default counts as the default: both are the same workflow.

    Args:
        config: a `[train]` table, or another one with the same keys.
        num_rows: of the training file.
    """
    size: int = config.batch_size
    return max(1, min(size, num_rows)) if size == default_batch_size(config) else size


def fitted(config: T, num_rows: int, *, key: str) -> T:
    """Return a table with all rows as its batch if there are fewer than the default; print a line about it.

    Args:
        config: a `[train]` table, or another one with the same keys.
        num_rows: of the training file.
        key: of the batch size, such as "train.batch_size".
    """
    written: Any = config
    size = batch_size_of(config, num_rows)
    if size == written.batch_size:
        return config
    fact = f"the training text fills {num_rows:,} rows"
    terminal.say(f"{key}: {size} instead of {written.batch_size}, the default: {fact}")
    return msgspec.structs.replace(config, batch_size=size)


def planned_steps(config: Any, num_rows: int) -> int:
    """Return the updates of a training, where epochs are a number of them.

    Args:
        config: a `[train]` table, or another one with the same keys.
        num_rows: of the training file.
    """
    if config.num_epochs == "auto":
        return int(config.num_steps)
    rows = batch_size_of(config, num_rows) * config.grad_accum_steps
    return steps_of(config.num_epochs, num_rows=num_rows, rows_per_step=rows)


def describe_length(config: Any, num_rows: int | None) -> str:
    """Return the length of a training in words, such as `3 epochs of 66 rows: 50 steps of 4 rows`.

    Args:
        config: a `[train]` table, or another one with the same keys.
        num_rows: of the training file; None if it does not exist yet.
    """
    rows = (config.batch_size if num_rows is None else batch_size_of(config, num_rows)) * config.grad_accum_steps
    is_in_epochs = config.num_epochs != "auto"
    if num_rows is None:
        return f"{_epochs(config.num_epochs)} of the corpus" if is_in_epochs else _counted(config.num_steps, "step")
    steps = planned_steps(config, num_rows)
    epochs = config.num_epochs if is_in_epochs else epochs_of(steps, num_rows=num_rows, rows_per_step=rows)
    done = f"{_counted(steps, 'step')} of {_counted(rows, 'row')}"
    return f"{_epochs(epochs)} of {_counted(num_rows, 'row')}: {done}"


def _epochs(number: float) -> str:
    text = f"{number:.3g}"
    return f"{text} epoch{'s' * (text != '1')}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def describe_stage(
    config: Mapping[str, Any], inputs: Iterable[str], root: Path, unbuilt: Container[str] = frozenset()
) -> str:
    """Return the length of the training of a stage in words; empty if it has none or if it is not known yet.

    Args:
        config: the stage's table, as JSON values.
        inputs: names of the files that it reads.
        root: the folder that they are relative to.
        unbuilt: folders of artifacts that will be built before; the rows of their token files are not known yet.
    """
    files = [Path(name) for name in inputs if Path(name).name == _TRAIN_TOKENS]
    trains = "grad_accum_steps" in config and config.get("method") in _TRAINING_METHODS
    if not files or not trains:
        return ""
    model = config["model"]
    origin = SimpleNamespace(from_=model["from"]) if isinstance(model, dict) else model
    table = SimpleNamespace(**{"num_epochs": "auto", **config, "model": origin})
    found = None if files[0].parent.as_posix() in unbuilt else read_rows(root / files[0])
    num_rows = found and found[0]
    return "" if num_rows is None and table.num_epochs == "auto" else describe_length(table, num_rows)


def read_rows(token_file: Path) -> tuple[int, dict[str, str]] | None:
    """Return the number of rows of a token file, and its metadata; None if it is missing or damaged.

    Args:
        token_file: of a pretokenize stage.
    """
    try:
        header, _ = tensor_header.read_safetensors_header(token_file)
        metadata = header["__metadata__"]
        _ = [int(metadata[key]) for key in ("targets", "vocab_size")]
        return int(header["tokens"]["shape"][0]), metadata
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
