"""Trial calls of a model, which compute nothing: the code of an architecture may fail for its config, or on a device.

MLX builds the graph of a call at once and computes it later, so shapes, missing kernels and missing gradients are found
in milliseconds, before anything is read or trained.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.models import config_fields
from mlxflow.ops import patching
from mlxflow.ops.module_caches import restored_caches
from mlxflow.ops.random_state import same_random_state
from mlxflow.storage.toml_tables import toml_value

_TOKENS = 2


class _TracedError(Exception):
    """The trace of a compiled function is complete."""


def require_call(model: nn.Module, config: Mapping[str, Any], name: str, *, vocab_size: int = 0) -> int:
    """Call a model with a few tokens, without a cache, as training and measuring do.

    Args:
        model: its weights are not read.
        config: its `config.json`.
        name: of that file or of the setting that describes the model, for the message.
        vocab_size: number of ids, V, that it will be given: MLX reads any memory for an id without a row.

    Returns:
        the number of rows of the embedding of the ids; 0 if none is known.

    Raises:
        ArtifactError: the call fails, or the embedding of the ids has fewer rows.
    """
    return _called(model, config, name, vocab_size)[0]


def require_generation(model: nn.Module, config: Mapping[str, Any], name: str, *, vocab_size: int = 0) -> int:
    """Call a model that will be given the ids that it generates; see `require_call`.

    Raises:
        ArtifactError: see there; or it may generate an id without a row.
    """
    rows, result = _called(model, config, name, vocab_size)
    if rows and rows < result.shape[-1]:
        raise ArtifactError(
            f"{name}: the head of the model has {result.shape[-1]:,} ids, its embedding {rows:,} rows. "
            "Name another model."
        )
    return rows


def require_rows(ids: Iterable[int], rows: int, name: str) -> None:
    """Refuse a prompt with an id without a row of the embedding: MLX reads any memory for it.

    Args:
        ids: of the prompt.
        rows: of the embedding; 0 if unknown.
        name: of the prompt or of the tokenizer, for the message.

    Raises:
        CallError: there is one.
    """
    if line := missing_row(ids, rows, name):
        raise CallError(line)


def missing_row(ids: Iterable[int], rows: int, name: str) -> str:
    """Return the line of `require_rows`; empty if every id has a row."""
    largest = max(ids, default=-1)
    if not rows or largest < rows:
        return ""
    return (
        f"{name}: the prompt has the id {largest:,}, the embedding of the model has {rows:,} rows. "
        "Use the tokenizer of the model, or another prompt."
    )


def _called(model: nn.Module, config: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, mx.array]:
    """Return the number of rows of the embedding, 0 if none is known, and the uncomputed result of a call."""
    tokens = mx.zeros((1, _TOKENS), mx.int32)
    with _reported(config, name, "mlx-lm cannot run that here"), same_random_state(), embeddings_of(tokens) as rows:
        result: mx.array = model(tokens)
    if rows and min(rows) < vocab_size:
        raise ArtifactError(
            f"{name}: the embedding of the model has {min(rows):,} rows, the tokens have {vocab_size:,} ids. "
            "Name another model, or tokens of its own tokenizer."
        )
    return min(rows, default=0), result


@contextmanager
def embeddings_of(tokens: mx.array) -> Iterator[list[int]]:
    """Yield the numbers of rows of the embeddings that are given some ids until the block ends."""
    rows: list[int] = []

    def recording(plain: Any) -> Any:
        def call(self: Any, x: mx.array) -> Any:
            if x is tokens:
                rows.append(self.weight.shape[0])
            return plain(self, x)

        return call

    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    replaced = [(kind, "__call__", recording(vars(kind)["__call__"])) for kind in kinds]
    with patching.attributes(*replaced, by=__name__):
        yield rows


def require_gradient(
    model: nn.Module, config: Mapping[str, Any], name: str, *, vocab_size: int = 0, compiles: bool = True
) -> None:
    """Call a model as `require_call` does, and derive its result by the trainable weights, in a compiled function.

    A model that reads values of its arrays within its call (DBRX: which expert a token has) cannot be compiled.

    Args:
        model: its weights are not read.
        config: its `config.json`.
        name: of that file or of the setting that describes the model, for the message.
        vocab_size: see `require_call`.
        compiles: whether the gradient will be compiled.

    Raises:
        ArtifactError: the call fails, MLX has no gradient of an operation, or cannot compile it; see `require_call`.
    """
    require_call(model, config, name, vocab_size=vocab_size)
    tokens, weights = mx.zeros((1, _TOKENS), mx.int32), model.trainable_parameters()
    if not weights:
        return

    def total(traced: Any) -> mx.array:
        model.update(traced)
        return cast("mx.array", model(tokens).sum())

    def trace(traced: Any) -> None:
        mx.grad(total)(traced)
        raise _TracedError  # MLX would simplify the graph next, which takes ten times as long

    with _reported(config, name, "MLX cannot train that"), same_random_state(), restored_caches(model):
        try:
            (mx.compile(trace) if compiles else trace)(weights)
        except _TracedError:
            pass
        finally:
            model.update(weights)


def choose(*, derives: bool, compiles: bool) -> Callable[..., object]:
    """Return `require_gradient`, with or without compilation, or else `require_call`."""
    return partial(require_gradient, compiles=compiles) if derives else require_call


@contextmanager
def _reported(config: Mapping[str, Any], name: str, problem: str) -> Iterator[None]:
    try:
        yield
    except config_fields.BUILD_ERRORS as error:
        kind, reason = toml_value(config.get("model_type")), config_fields.kind_and_reason(error)
        raise ArtifactError(f"{name}: model_type = {kind}: {problem} ({reason}). Name another model.") from error
