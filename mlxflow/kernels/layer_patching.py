"""Patches the layers of a model to use the kernels, by what they compute and not by their class names.

Each layer is run on random inputs (`pattern_detection`). One that matches a pattern gets a subclass of its class whose
`__call__` uses the kernel, until the context ends. Parameters keep their names; adapters, fake quantization and
quantized weights in a layer work as before.
"""

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlxflow.kernels import cache
from mlxflow.kernels.fingerprint import environment
from mlxflow.kernels.layer_patterns import LayerPattern
from mlxflow.kernels.layer_signature import NoSignature, SignatureBuilder, group_layers, sources
from mlxflow.kernels.pattern_detection import detect_pattern, may_match
from mlxflow.kernels.registry import KernelSelection
from mlxflow.ops import patching


def find_layers(model: nn.Module) -> list[tuple[nn.Module, LayerPattern]]:
    """Return the layers that kernels can replace, and the pattern of each.

    One of each group of equal layers is run. The result is cached in the user's cache folder, under a key of all that
    it depends on: the device, MLX, the sources of this package and those of the layer.

    Args:
        model: of any architecture; its weights are as before afterwards.
    """
    groups = [group for group in group_layers(model) if may_match(group[0])]
    keys = _cache_keys([group[0] for group in groups])
    cached, new, layers = cache.read_layers(), {}, []
    for group, key in zip(groups, keys, strict=True):
        try:
            pattern = msgspec.convert(cached[key or ""], LayerPattern | None)
        except (KeyError, msgspec.ValidationError):
            pattern, is_cacheable = detect_pattern(group[0])
            if key is not None and is_cacheable:
                new[key] = msgspec.to_builtins(pattern)
        if pattern is not None:
            layers += [(module, pattern) for module in group]
    if new:
        cache.add_layers(new)
    return layers


def _cache_keys(layers: list[nn.Module]) -> list[str | None]:
    """Return the cache key of each layer; None for a layer without a signature."""
    builder = SignatureBuilder()
    texts = [_signature(layer, builder) for layer in layers]
    try:
        where = (environment(), sources(builder.modules))
    except (NoSignature, OSError):
        return [None] * len(layers)
    return [None if text is None else cache.key_of("layer", *where, text) for text in texts]


def _signature(layer: nn.Module, builder: SignatureBuilder) -> str | None:
    try:
        return builder.signature(layer)
    except NoSignature:
        return None


@contextmanager
def patched(
    layers: list[tuple[nn.Module, LayerPattern]], selection: KernelSelection, dtype: mx.Dtype
) -> Iterator[None]:
    """Let layers use the selected kernels until the block ends. Enter it before a step is compiled.

    Args:
        layers: of `find_layers`.
        selection: of the kernels.
        dtype: in which the model computes.
    """
    chosen = [(module, pattern) for module, pattern in layers if selection.uses(pattern.kernel_name(module, dtype))]
    changes = [(module, _patched_class(cast("Hashable", type(module)), pattern, dtype)) for module, pattern in chosen]
    with patching.layer_classes(changes, by=__name__):
        yield


@functools.cache
def _patched_class(plain: type[nn.Module], pattern: LayerPattern, dtype: mx.Dtype) -> type[nn.Module]:
    return type(f"Patched{plain.__name__}", (plain,), {"__call__": pattern.patched_call(plain, dtype)})
