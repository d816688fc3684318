"""Lets what needs a GPU run on the CPU: each kernel is stood in for by its reference, which counts its calls."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.kernels import adamw, attention, cross_entropy, embedding, gated_activation, rms_norm, rotary


def use_references(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Put the references in the place of the kernels; return how often each is called."""
    calls: Counter[str] = Counter()

    def stand_in(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    def put(module: Any, kernel: str, reference: str) -> None:
        name = f"{module.__name__.rpartition('.')[2]}.{kernel}"
        monkeypatch.setattr(module, kernel, stand_in(name, getattr(module, reference)))

    put(rms_norm, "kernel", "reference")
    put(rms_norm, "kernel_gradients", "reference_gradients")
    put(rms_norm, "kernel_sum", "reference_sum")
    put(rms_norm, "kernel_sum_gradients", "reference_sum_gradients")
    for kernel, reference in (
        ("kernel_frozen_gradient", rms_norm.reference_gradients),
        ("kernel_sum_frozen_gradient", rms_norm.reference_sum_gradients),
    ):
        monkeypatch.setattr(rms_norm, kernel, stand_in(f"rms_norm.{kernel}", _first(reference)))
    put(gated_activation, "kernel_gradients", "reference_gradients")
    put(gated_activation, "kernel_joined", "reference_joined")
    put(rotary, "kernel", "reference")
    put(attention, "kernel", "reference")
    put(attention, "kernel_gradients", "reference_gradients")
    put(embedding, "kernel_gradient", "reference_gradient")
    put(cross_entropy, "kernel_gradient", "reference_gradient")
    put(adamw, "kernel", "reference")
    put(adamw, "kernel_sum_of_squares", "reference_sum_of_squares")
    return calls


def _first(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)[0]


@pytest.fixture
def uncompiled() -> Any:
    """Let MLX run everything uncompiled: on the CPU each new graph would cost seconds of g++."""
    mx.disable_compile()
    yield
    mx.enable_compile()
