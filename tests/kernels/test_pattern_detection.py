from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.kernels import layer_patching
from mlxflow.kernels.layer_patterns import Block, GatedMLP, Norm
from mlxflow.kernels.registry import recorded
from tests.kernels.stand_ins import uncompiled, use_references  # noqa: F401
from tests.kernels.test_layer_patching import _fitted, _lora
from tests.small_models import llama


class _LayerLike(nn.Module):  # type: ignore[misc]
    def __init__(self, activation: Callable[[mx.array], mx.array], bias: bool, more: float) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8), nn.Linear(8, 16)
        self.activation, self.more = activation, more

    def __call__(self, x: mx.array) -> mx.array:
        found: mx.array = self.b(self.activation(self.c(x)) * self.a(x) + self.more)
        return found


@pytest.mark.parametrize(
    ("activation", "more", "expected"),
    [
        (nn.silu, 0.0, GatedMLP("silu", "c", "a", "b", False)),
        (nn.gelu, 0.0, GatedMLP("gelu", "c", "a", "b", False)),
        (nn.gelu_approx, 0.0, GatedMLP("gelu_approx", "c", "a", "b", False)),
        (nn.relu, 0.0, None),
        (nn.silu, 0.1, None),
    ],
)
def test_a_gated_layer_is_recognized_by_its_results(
    activation: Callable[[mx.array], mx.array], more: float, expected: object
) -> None:
    mx.random.seed(0)
    layers = layer_patching.find_layers(_LayerLike(activation, True, more))
    assert [pattern for _, pattern in layers] == ([] if expected is None else [expected])


class _BlockLike(nn.Module):  # type: ignore[misc]
    def __init__(self, *, scale: float = 1.0, hands_on: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-3)
        self.c, self.d = _Mixer(), _LayerLike(nn.silu, False, 0.0)
        self.scale, self.hands_on = scale, hands_on

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        h = x + self.c(self.b(x), mask if self.hands_on else None, cache) * self.scale
        found: mx.array = self.d(self.a(h)) + h
        return found


class _Mixer(nn.Module):  # type: ignore[misc]
    def __call__(self, x: mx.array, mask: mx.array | None, cache: object) -> mx.array:
        return mx.cumsum(x, axis=-2) if mask is None else mx.cumsum(x * mask, axis=-2)


def test_a_block_is_recognized_by_its_forward_pass() -> None:
    block = _BlockLike()
    fit = {type(module): fit for module, fit in layer_patching.find_layers(block)}[_BlockLike]
    assert fit == Block(("b", "a"), ("c", "d"), (Norm(1e-3, 0.0), Norm(1e-5, 0.0)))
    x, mask = mx.random.normal((2, 4, 8), key=mx.random.key(0)), mx.array([[1.0], [0.0], [1.0], [1.0]])
    for others, named in (((), {}), ((mask,), {}), ((None,), {"cache": None}), ((), {"mask": mask})):
        wanted = block(x, *others, **named)
        with _fitted(block):
            assert type(block).__name__ == "Patched_BlockLike"
            assert mx.allclose(block(x.astype(mx.float32), *others, **named), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [_BlockLike(scale=0.5), _BlockLike(hands_on=False)])
def test_a_block_with_another_forward_pass_is_not_recognized(block: nn.Module) -> None:
    assert not any(isinstance(fit, Block) for _, fit in layer_patching.find_layers(block))
    assert type(block.c) is _Mixer


def test_plain_linear_projections_are_recognized() -> None:
    layer = _LayerLike(nn.silu, False, 0.0)
    layer.c = nn.Linear(8, 16, bias=False)
    ((_, fit),) = layer_patching.find_layers(layer)
    assert fit == GatedMLP("silu", "c", "a", "b", True)
    assert fit.kernel_name(layer, mx.bfloat16) == "mlp_silu/bfloat16"
    name = fit.kernel_name(layer, mx.float32)
    x = mx.random.normal((2, 8), key=mx.random.key(0))
    wanted = layer(x)
    with layer_patching.patched([(layer, fit)], recorded([name], [name]), mx.float32):
        layer.a = nn.Linear(8, 16, bias=True)  # no longer a product alone: computes as its class has it
        layer.a.weight, layer.a.bias = mx.zeros((16, 8)), mx.ones(16)
        assert mx.allclose(layer(x), layer.b(nn.silu(layer.c(x))), rtol=1e-5)
        assert not mx.allclose(layer(x), wanted)


def test_dropout_of_an_adapter_does_not_hide_a_layer() -> None:
    model, _ = llama(hidden_size=64, intermediate_size=64)
    _lora(model, "lora", dropout=0.5)
    model.train()
    assert len(layer_patching.find_layers(model)) == 12
    assert all(module.training for module in model.modules())
