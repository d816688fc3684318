"""Inputs of single layers during a forward pass, and layers with other weights or none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.patching import layer_method
from mlxflow.quantization.codec import Packed, unpack
from mlxflow.quantization.settings import Setting


def input_products(
    module: nn.Module, paths: list[str], run: Callable[[int, int], mx.array], spans: Iterable[tuple[int, int]]
) -> dict[str, mx.array]:
    """Return for each layer the sum over the inputs of its products of x x^T, (D, D), in fp32.

    Layers that read one array in all calls share its product. Lookups of an embedding have none; its use as a head has.

    Args:
        module: contains the layers.
        paths: of the layers within it.
        run: computes it on consecutive rows.
        spans: the first row, and one past the last, of each call of `run`.
    """
    sums: dict[tuple[str, ...], mx.array] = {}
    seen: dict[int, tuple[mx.array, list[str]]] = {}

    def noting(path: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def noted_call(self: Any, x: mx.array, *others: Any, **named: Any) -> Any:
                seen.setdefault(id(x), (x, []))[1].append(path)
                return call(self, x, *others, **named)

            return noted_call

        return make

    def add(x: mx.array, readers: tuple[str, ...]) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        product = rows.T @ rows
        sums[readers] = sums[readers] + product if readers in sums else product
        mx.eval(sums[readers])

    modules = dict(module.named_modules())
    with ExitStack() as stack:
        for path in paths:
            name = "as_linear" if hasattr(modules[path], "as_linear") else "__call__"
            stack.enter_context(layer_method(modules[path], name, noting(path), by=__name__))
        for span in spans:
            run(*span)
            while seen:
                x, own = seen.pop(next(iter(seen)))
                add(x, tuple(own))
    found: dict[str, mx.array] = {}
    for readers, product in sums.items():
        for path in readers:
            found[path] = found[path] + product if path in found else product
    sums.clear()  # see `layer_method`
    return found


@contextmanager
def other_weights(model: nn.Module, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """Give layers other weights until the block ends."""
    modules = dict(model.named_modules())
    dense = {path: modules[path].weight for path in weights}
    try:
        for path, weight in weights.items():
            modules[path].weight = weight
        yield
    finally:
        for path, weight in dense.items():
            modules[path].weight = weight


def with_codes(
    load: Callable[[], nn.Module], plan: Mapping[str, Setting], codes: Callable[[], Mapping[str, Packed]]
) -> Callable[[], nn.Module]:
    """Return a function that loads a dense model whose layers have the lazy weights of some codes.

    Args:
        load: returns the dense model, with lazy weights of its own.
        plan: module path to setting.
        codes: returns codes of its layers by path, with arrays of its own.
    """

    def loaded() -> nn.Module:
        model, packed = load(), codes()
        modules = dict(model.named_modules())
        for path, setting in plan.items():
            modules[path].weight = unpack(packed[path], setting, modules[path].weight.dtype)
        return model

    return loaded


def remove_weights(block: nn.Module) -> None:
    """Remove all arrays of a module, which frees their memory."""
    for module in block.modules():
        for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
            module.pop(name)
