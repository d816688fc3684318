"""Feed-forward layers in chunks of tokens: the same values and gradients, in memory that does not grow with tokens."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.ops import token_chunks
from mlxflow.ops.token_chunks import by_chunks, chunk_tokens, is_token_wise


class _MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        mx.random.seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.down_proj(self.dropout(nn.silu(self.gate_proj(x)) * self.up_proj(x)))
        return result


def _gradients(layer: nn.Module, x: mx.array, kind: type[nn.Module]) -> tuple[mx.array, list[Any]]:
    """Return a compiled loss and the gradients of x and the weights, with the layer being of a class."""
    layer.__class__ = kind

    def loss(weights: Any, x: mx.array) -> mx.array:
        layer.update(weights)
        total: mx.array = (layer(x) * mx.cos(mx.arange(x.shape[-1]))).sum()
        return total

    weights = layer.trainable_parameters()
    value, (tree, dx) = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(weights, x)
    mx.eval(value, tree, dx)
    layer.update(weights)
    return value, [dx, *(leaf for _, leaf in tree_flatten(tree))]


def test_chunks_have_the_values_and_gradients_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_chunks, "_MIN_TOKENS", 16)
    monkeypatch.setattr(token_chunks, "_CHUNK_BYTES", 48 * 16 * 4)
    layer = _MLP(24, 48)
    assert is_token_wise(layer)
    assert chunk_tokens(layer, mx.float32) == 16
    layer.up_proj.freeze()
    x = mx.random.normal((3, 19, 24), key=mx.random.key(1))
    expected, gradients = _gradients(layer, x, _MLP)
    found, others = _gradients(layer, x, by_chunks(_MLP))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert len(others) == len(gradients) == 4
    for one, other in zip(gradients, others, strict=True):
        assert float(mx.abs(one - other).max()) <= 1e-5 * float(mx.abs(one).max())


@pytest.mark.matrix
def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_chunks, "_CHUNK_BYTES", 1 << 20)
    layer = _MLP(16, 512)

    def peak(kind: type[nn.Module], tokens: int) -> int:
        x = mx.random.normal((1, tokens, 16), key=mx.random.key(1))
        mx.eval(layer.parameters(), x)
        _gradients(layer, x, kind)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        _gradients(layer, x, kind)
        return mx.get_peak_memory() - held

    wide = 32 * 1024 * 512 * 4
    assert peak(_MLP, 64 * 1024) - peak(_MLP, 32 * 1024) > 3 * wide  # gate, up and their product
    assert peak(by_chunks(_MLP), 64 * 1024) - peak(by_chunks(_MLP), 32 * 1024) < wide / 4


def test_layers_that_mix_tokens_or_drop_out_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models.llama import Attention, ModelArgs

    shape = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    args = ModelArgs(**shape, num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=9, num_key_value_heads=1)
    assert not is_token_wise(Attention(args))
    assert not is_token_wise(nn.Linear(4, 8))
    assert not is_token_wise("mlp")
    monkeypatch.setattr(token_chunks, "_MIN_TOKENS", 4)
    monkeypatch.setattr(token_chunks, "_CHUNK_BYTES", 1)
    layer = _MLP(8, 16, dropout=0.5)
    x = mx.ones((1, 64, 8))
    mx.random.seed(3)
    expected = layer(x)
    layer.__class__ = by_chunks(_MLP)
    mx.random.seed(3)
    assert mx.array_equal(layer(x), expected)
