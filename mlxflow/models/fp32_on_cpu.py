"""16-bit models that a CPU computes in fp32: it multiplies 16-bit numbers 10 to 40 times more slowly.

The weights are the same numbers, and sums and intermediate results have more digits, so that nothing is less precise.
On a GPU everything here leaves a model as it is.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlxflow.ops import wide_scales

# The share of the memory up to which the weights of a whole model are widened
_MOST_SHARE = 0.5

_NARROW = (mx.float16, mx.bfloat16)


def computed_dtype() -> Literal["fp32", "stored"]:
    """Return the dtype in which 16-bit models are computed, for the names of cached results."""
    return "fp32" if mx.default_device() == mx.cpu else "stored"


def dtype_in_products(stored: mx.Dtype) -> mx.Dtype:
    """Return the dtype in which weights of a stored dtype are computed: fp32 for 16 bits on a CPU."""
    return mx.float32 if mx.default_device() == mx.cpu and stored in _NARROW else stored


def widened(tree: Any) -> Any:
    """Return a tree of values with its floating arrays in fp32 on a CPU, lazily; unchanged on a GPU."""
    if mx.default_device() != mx.cpu:
        return tree
    return tree_map(_in_fp32, tree)


def loading_in_fp32_on_cpu(load: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that loads a model, lazily cast to fp32 on a CPU.

    With lazy weights, a model that reads one block at a time (`evaluation.streamed_model`) also widens one at a time.
    """

    def loaded() -> nn.Module:
        model = load()
        widen(model, at_any_size=True)
        return model

    return loaded


def widen(model: nn.Module, *, at_any_size: bool = False, keeps: Set[str] = frozenset()) -> None:
    """Let a model compute in fp32 on a CPU; nothing is evaluated.

    Matrices of the blocks stay in 16 bits if the model in fp32 would take more than half of the memory: rows in fp32
    make MLX widen each of them for its product. Embeddings with float codes, which MLX looks up in bf16, give fp32.

    Args:
        model: changed.
        at_any_size: whether all weights are cast however large the model is, since they are not held together.
        keeps: paths of parameters, or of modules whose parameters, stay as they are.
    """
    if mx.default_device() != mx.cpu:
        return
    parameters = model.parameters()
    size = sum(_bytes_in_fp32(value) for _, value in tree_flatten(parameters))
    blocks: tuple[str, ...] = ()
    if not at_any_size and size > _MOST_SHARE * psutil.virtual_memory().total:
        blocks = tuple(f"{path}." for path in _block_paths(model))

    def cast(path: str, value: Any) -> Any:
        is_kept = path in keeps or path.rpartition(".")[0] in keeps
        stays = is_kept or (path.startswith(blocks) and value.ndim > 1)
        return value if stays else _in_fp32(value)

    model.update(tree_map_with_path(cast, parameters))
    for path, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedEmbedding) and layer.mode != "affine" and path not in keeps:
            wide_scales.mark(layer)


@contextmanager
def training_in_fp32(model: nn.Module, *, keeps: Set[str] = frozenset()) -> Iterator[None]:
    """Let a model be trained in fp32 on a CPU, however large it is, until the block ends; nothing is evaluated.

    Then its parameters get the dtypes back that they had.

    Args:
        model: changed.
        keeps: see `widen`.
    """
    stored = {name: value.dtype for name, value in tree_flatten(model.parameters())}
    widen(model, at_any_size=True, keeps=keeps)
    try:
        yield
    finally:
        model.update(
            tree_map_with_path(lambda name, value: value.astype(stored.get(name, value.dtype)), model.parameters())
        )


def _in_fp32(value: Any) -> Any:
    return value.astype(mx.float32) if _is_narrow(value) else value


def _is_narrow(value: Any) -> bool:
    return isinstance(value, mx.array) and value.dtype in _NARROW


def _bytes_in_fp32(value: mx.array) -> int:
    return 4 * value.size if _is_narrow(value) else value.nbytes


def _block_paths(model: nn.Module) -> list[str]:
    ids = {id(block) for block in getattr(model, "layers", None) or []}
    return [path for path, module in model.named_modules() if id(module) in ids]
