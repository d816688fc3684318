"""Selects the kernels for training a model and installs them: those that it can use and that passed verification."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.attention_overrides import Causal, first_causal_heads
from mlxflow.ops.quantized_matmul import Format, IsFasterDense

if TYPE_CHECKING:
    from mlxflow.kernels.early_start import EarlyVerifier
    from mlxflow.kernels.layer_patterns import LayerPattern
    from mlxflow.kernels.registry import KernelSelection


class TrainingTraits(NamedTuple):
    """The properties of a training run that the selection of kernels depends on.

    Attributes:
        precision: "fp32", "bf16" or "bf16-pure".
        context_length: tokens in a row.
        masks_documents: no token attends to another document in its row.
        sums_gradients: whether an update may take more than one forward pass.
        is_deterministic: whether gradients are added up in a fixed order; if not, MLX's attention is used.
    """

    precision: str
    context_length: int
    masks_documents: bool = False
    sums_gradients: bool = False
    is_deterministic: bool = True

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the model computes."""
        return mx.float32 if self.precision == "fp32" else mx.bfloat16


class ModelKernels(NamedTuple):
    """The kernels selected for a model.

    Attributes:
        uses: returns whether the kernel of a name is used.
        uses_loss_kernel: whether the gradient of the loss is computed by a kernel.
        patched: a context in which the model's layers use their kernels; enter it before a step is compiled.
        selected: names of the kernels that are used.
        refused: why the others are not, by name.
        attention: causal attention by a kernel; None if it is not used.
        keeps_mlx_attention: whether MLX's own attention gives the same gradients twice, to the bit.
        is_faster_dense: which products with quantized weights take a dense copy; None if none does.
    """

    uses: Callable[[str], bool]
    uses_loss_kernel: bool
    patched: Callable[[], AbstractContextManager[None]]
    selected: list[str]
    refused: dict[str, str]
    attention: Causal | None = None
    keeps_mlx_attention: bool = False
    is_faster_dense: IsFasterDense | None = None


def no_kernels() -> ModelKernels:
    """Return a selection without kernels; imports none of them."""
    return ModelKernels(lambda _: False, False, nullcontext, [], {})


def recorded_for(model: nn.Module, traits: TrainingTraits, names: Iterable[str]) -> ModelKernels:
    """Rebuild the kernel selection that a training run recorded, without verifying again.

    With no names, no kernel is imported.

    Args:
        model: evaluated, in the dtype in which it computes.
        traits: of the training.
        names: of the recorded kernels.
    """
    recorded = list(names)
    return choose_for(model, traits, recorded=recorded) if recorded else no_kernels()


def begin_verification(ahead: "EarlyVerifier | None" = None) -> "EarlyVerifier":
    """Start the verifier process, unless results for the default device are cached; it ends with the block.

    It gets ready while the model is built; `choose_for` sends it the kernel names.

    Args:
        ahead: the process, if it was started earlier.
    """
    from mlxflow.kernels import registry

    return registry.begin(ahead)


def choose_for(
    model: nn.Module,
    traits: TrainingTraits,
    *,
    recorded: Iterable[str] | None = None,
    ahead: "EarlyVerifier | None" = None,
    precompile_step: Callable[[ModelKernels], object] = lambda _: None,
) -> ModelKernels:
    """Select the kernels for training a model on the default device; verify those without a cached result.

    Args:
        model: evaluated, in the dtype in which it computes.
        traits: of the training.
        recorded: names of the kernels of the run that is repeated or continued; then nothing is verified.
        ahead: of `begin_verification`.
        precompile_step: called with the expected selection while verification waits for MLX's compiler.
    """
    from mlxflow.kernels import kernel_names, layer_patching, registry

    dtype = traits.dtype
    layers = layer_patching.find_layers(model)
    names = {pattern.kernel_name(module, dtype) for module, pattern in layers}
    names |= _update_kernels(traits) | _attention_kernels(model, traits) | _quantized_products(model, dtype)
    known = [name for name in names if kernel_names.is_known(name)]
    if recorded is not None:
        return _model_kernels(registry.recorded(known, recorded), layers, dtype)
    selection = registry.choose(known, ahead, lambda expected: precompile_step(_model_kernels(expected, layers, dtype)))
    return _model_kernels(selection, layers, dtype)


def _update_kernels(traits: TrainingTraits) -> set[str]:
    """Return the names of the kernels of the loss and the optimizer."""
    from mlxflow.kernels import kernel_names

    weights = mx.bfloat16 if traits.precision == "bf16-pure" else mx.float32
    dtypes = [traits.dtype, mx.float32] if traits.sums_gradients else [traits.dtype]  # sums are in fp32
    updates = {kernel_names.adamw_name(weights, dtype) for dtype in dtypes}
    norms = {kernel_names.sum_of_squares_name(dtype) for dtype in dtypes}
    return updates | norms | {kernel_names.cross_entropy_name(traits.dtype)}


def _quantized_products(model: nn.Module, dtype: mx.Dtype) -> set[str]:
    """Return the names of the products with a model's quantized weights."""
    from mlxflow.kernels import quantized_product

    layers = [layer for layer in model.modules() if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)]
    kinds = {(layer.weight.shape, Format(layer.group_size, layer.bits, layer.mode)): layer for layer in layers}
    shapes = [
        quantized_product.shape_of(dtype, layer.weight, form, rows)
        for (_, form), layer in kinds.items()
        for rows in quantized_product.ROW_CLASSES
    ]
    return {shape.name for shape in shapes if shape is not None}


def _attention_kernels(model: nn.Module, traits: TrainingTraits) -> set[str]:
    """Return the names of the attention kernels that a model can use; on Metal, of the checks of MLX's attention."""
    from mlxflow.kernels import kernel_names, repeatability

    if not traits.is_deterministic:
        return set()
    masks = traits.masks_documents
    heads = first_causal_heads(model, context_length=traits.context_length, masks_documents=masks)
    if heads is None:
        return set()
    kinds = {heads.is_bounded, masks}  # one layer may have a window, and another none
    if mx.metal.is_available():
        return {repeatability.attention_check(traits.dtype, heads.width, is_masked=kind) for kind in kinds}
    return {kernel_names.attention_name(traits.dtype, heads.width, is_bounded=is_bounded) for is_bounded in kinds}


def _model_kernels(
    selection: "KernelSelection", layers: "list[tuple[nn.Module, LayerPattern]]", dtype: mx.Dtype
) -> ModelKernels:
    from mlxflow.kernels import attention, kernel_names, layer_patching, quantized_product, repeatability

    @contextmanager
    def patched() -> Iterator[None]:
        with layer_patching.patched(layers, selection, dtype):
            yield

    def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, low: mx.array | None) -> mx.array | None:
        name = kernel_names.attention_name(q.dtype, q.shape[3], is_bounded=low is not None)
        if not selection.uses(name) or not attention.supports(q, k, v, scale, low):
            return None
        return attention.attention(scale)(q, k, v, *([] if low is None else [low]))

    def is_faster_dense(x: mx.array, codes: mx.array, transpose: bool, form: Format) -> bool:
        shape = quantized_product.shape_of(x.dtype, codes, form, math.prod(x.shape[:-1]))
        return shape is not None and selection.uses(shape.name)

    loss = selection.uses(kernel_names.cross_entropy_name(dtype))
    attends = any(name.startswith("attention") for name in selection.selected)
    checks = {name: result.passed for name, result in selection.results.items() if repeatability.is_check(name)}
    return ModelKernels(
        selection.uses,
        loss,
        patched,
        selection.selected,
        {name: reason for name, reason in selection.refused.items() if name not in checks},
        attend if attends else None,
        bool(checks) and all(checks.values()),
        is_faster_dense if any(name.startswith(quantized_product.KIND) for name in selection.selected) else None,
    )
