from collections.abc import Callable
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.kernels import layer_signature
from mlxflow.kernels.layer_patterns import GatedMLP, Norm
from tests.kernels.test_cache import _Activated, _fits, _own_cache, layers, tried  # noqa: F401


def test_a_class_made_at_run_time_is_not_cached(layers: Callable[..., ModuleType], tried: list[str]) -> None:  # noqa: F811
    kind = layers().Norm
    made = type("Norm", (kind,), {"__module__": kind.__module__, "__qualname__": "Norm"})
    for _ in range(2):
        assert _fits(made()) == [Norm(1e-5, 0.0)]
    assert tried == ["Norm", "Norm"]


def test_a_class_with_a_function_from_elsewhere_is_not_cached(
    layers: Callable[..., ModuleType],  # noqa: F811
    tried: list[str],  # noqa: F811
) -> None:
    kind = layers().Norm
    assert _fits(kind()) == [Norm(1e-5, 0.0)]
    kind.__call__ = lambda self, x: x * 3
    for _ in range(2):
        assert _fits(kind()) == []
    assert tried == ["Norm"] * 3


def test_a_replaced_function_of_a_module_changes_the_signature(
    layers: Callable[..., ModuleType],  # noqa: F811
    tried: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layers()
    assert _fits(module.Norm()) == [Norm(1e-5, 0.0)]
    monkeypatch.setattr(module, "scaled", _other)
    assert _fits(module.Norm()) == []


def _other(x: mx.array, eps: float) -> mx.array:
    return x * 3


def test_layers_that_differ_in_a_function_have_different_signatures(
    tried: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_signature, "_process_start", lambda: float("inf"))  # this file may be new
    model = nn.Sequential(_Activated(nn.silu), _Activated(nn.relu), _Activated(nn.gelu))
    for _ in range(2):
        assert [fit.activation for fit in _fits(model) if isinstance(fit, GatedMLP)] == ["silu", "gelu"]
    assert tried.count("_Activated") == 3 + 1, "that a layer with weights is none may be due to its weights"
    _fits(_Activated(lambda x: x))
    tried.clear()
    _fits(_Activated(lambda x: x))
    assert tried == ["_Activated"]
