"""Which of our kernels serve a training run: those that its model, types and update could use, and that are proved."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.attention_overrides import Causal, Heads, first_causal_heads

if TYPE_CHECKING:
    from mlxflow.kernels.early_start import Ahead
    from mlxflow.kernels.layer_patterns import LayerPattern
    from mlxflow.kernels.registry import KernelSelection


class Serving(NamedTuple):
    """What serves.

    Attributes:
        serves: tells it of a kernel's name.
        serves_loss: whether the gradient of the loss is a kernel's.
        fitted: gives the model's layers their kernels until the block ends; begin before a step is compiled.
        serving: names of the kernels that serve.
        refused: why others do not, by name.
        attention: causal attention by a kernel; None where none serves.
    """

    serves: Callable[[str], bool]
    serves_loss: bool
    fitted: Callable[[], AbstractContextManager[None]]
    serving: list[str]
    refused: dict[str, str]
    attention: Causal | None = None


def nothing() -> Serving:
    """Return that none serves; imports nothing of the kernels."""
    return Serving(lambda _: False, False, nullcontext, [], {})


def recorded_for(
    model: nn.Module,
    *,
    precision: str,
    names: Iterable[str],
    context_length: int,
    masks_documents: bool,
    sums_gradients: bool = False,
) -> Serving:
    """Return what serves where training recorded what did: those of these names, unproved; none is imported for none.

    Args:
        model: evaluated, in the type in which it computes.
        precision: "fp32", "bf16" or "bf16-pure".
        names: of the kernels.
        context_length: tokens in a row.
        masks_documents: no token attends to another document in its row.
        sums_gradients: whether an update may take more than one forward pass.
    """
    recorded = list(names)
    if not recorded:
        return nothing()
    dtype = mx.float32 if precision == "fp32" else mx.bfloat16
    return choose_for(
        model,
        dtype=dtype,
        precision=precision,
        sums_gradients=sums_gradients,
        context_length=context_length,
        masks_documents=masks_documents,
        recorded=recorded,
    )


def begin_proof(ahead: "Ahead | None" = None) -> "Ahead":
    """Start the process that proves kernels, where none is known on the default device; it ends with the block.

    It makes itself ready while the model is built, and is told what to prove by `choose_for`.

    Args:
        ahead: that process, where it was started earlier.
    """
    from mlxflow.kernels import registry

    return registry.begin(ahead)


def choose_for(
    model: nn.Module,
    *,
    dtype: mx.Dtype,
    precision: str,
    sums_gradients: bool,
    context_length: int,
    masks_documents: bool = False,
    is_deterministic: bool = True,
    recorded: Iterable[str] | None = None,
    ahead: "Ahead | None" = None,
    rehearse: Callable[[Serving], object] = lambda _: None,
) -> Serving:
    """Return what serves the training of a model on the default device; prove what is not known yet.

    Args:
        model: evaluated.
        dtype: in which it computes.
        precision: "fp32", "bf16" or "bf16-pure".
        sums_gradients: whether an update may take more than one forward pass.
        context_length: tokens in a row.
        masks_documents: no token attends to another document in its row.
        is_deterministic: whether gradients are to be added up in one order; else MLX's attention serves.
        recorded: names of what served the run that is repeated or gone on with; then nothing is proved.
        ahead: of `begin_proof`.
        rehearse: called with what is to serve if all is right, where the proof waits for MLX's compiler.
    """
    from mlxflow.kernels import kernel_names, layer_patching, registry

    layers = layer_patching.find_layers(model)
    heads = None
    if is_deterministic and not mx.metal.is_available():
        heads = first_causal_heads(model, context_length=context_length, masks_documents=masks_documents)
    wanted = {pattern.kernel_name(module, dtype) for module, pattern in layers}
    wanted |= _names_of_update(dtype, precision, sums_gradients) | _names_of_attention(dtype, heads, masks_documents)
    known = [name for name in wanted if kernel_names.is_known(name)]
    if recorded is not None:
        return _serving_by(registry.recorded(known, recorded), layers, dtype)
    chosen = registry.choose(known, ahead, lambda expected: rehearse(_serving_by(expected, layers, dtype)))
    return _serving_by(chosen, layers, dtype)


def _names_of_update(dtype: mx.Dtype, precision: str, sums_gradients: bool) -> set[str]:
    """Return the kernels of the loss and the optimizer."""
    from mlxflow.kernels import kernel_names

    weights = mx.bfloat16 if precision == "bf16-pure" else mx.float32
    gradients = [dtype, mx.float32] if sums_gradients else [dtype]  # sums are in fp32
    updates = {kernel_names.adamw_name(weights, one) for one in gradients} | {
        kernel_names.sum_of_squares_name(one) for one in gradients
    }
    return updates | {kernel_names.cross_entropy_name(dtype)}


def _names_of_attention(dtype: mx.Dtype, heads: Heads | None, masks_documents: bool) -> set[str]:
    from mlxflow.kernels import kernel_names

    if heads is None:
        return set()
    kinds = {heads.is_bounded, masks_documents}  # where it is a window that bounds one layer, another may have none
    return {kernel_names.attention_name(dtype, heads.width, is_bounded=is_bounded) for is_bounded in kinds}


def _serving_by(
    selection: "KernelSelection", layers: "list[tuple[nn.Module, LayerPattern]]", dtype: mx.Dtype
) -> Serving:
    from mlxflow.kernels import attention, kernel_names, layer_patching

    @contextmanager
    def fitted() -> Iterator[None]:
        with layer_patching.patched(layers, selection, dtype):
            yield

    def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, low: mx.array | None) -> mx.array | None:
        name = kernel_names.attention_name(q.dtype, q.shape[3], is_bounded=low is not None)
        if not selection.uses(name) or not attention.supports(q, k, v, scale, low):
            return None
        return attention.attention(scale)(q, k, v, *([] if low is None else [low]))

    loss = selection.uses(kernel_names.cross_entropy_name(dtype))
    attends = any(name.startswith("attention") for name in selection.selected)
    return Serving(selection.uses, loss, fitted, selection.selected, selection.refused, attend if attends else None)
