"""LoRA layers in groups: the outputs and gradients of mlx-lm's layers, in every format and for any number of rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.ops import adapter_products, quantized_matmul

FORMATS: list[dict[str, Any]] = [
    *[{"mode": "affine", "bits": bits, "group_size": size} for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)],
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
]


_MakeBase = Callable[[int, int, bool], nn.Module]


class _Siblings(nn.Module):  # type: ignore[misc]
    """Three layers with adapters that read one array, and one that reads another."""

    def __init__(
        self, make_base: Callable[[int, int, bool], nn.Module], *, has_bias: bool, dropout: float = 0.0
    ) -> None:
        from mlx_lm.tuner.lora import LoRALinear

        super().__init__()
        mx.random.seed(0)
        for name, outputs in {"q": 128, "k": 64, "v": 64, "o": 128}.items():
            layer = LoRALinear.from_base(make_base(128, outputs, has_bias), r=4, scale=2.5, dropout=dropout)
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
            layer.linear.freeze()
            setattr(self, name, layer)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = self.q(x), self.k(x), self.v(x)
        output: mx.array = self.o(mx.tanh(q) * mx.concatenate([k, v], axis=-1))
        return output


def _dense(inputs: int, outputs: int, has_bias: bool) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=has_bias)


def _result(model: nn.Module, x: mx.array, *, replaced: bool) -> list[tuple[str, mx.array]]:
    """Return outputs and the gradients of x and the adapters."""

    def loss(weights: Any, x: mx.array) -> mx.array:
        model.update(weights)
        total: mx.array = (model(x) * mx.cos(mx.arange(128))).sum()
        return total

    compute = mx.value_and_grad(loss, argnums=(0, 1))
    weights = model.trainable_parameters()
    if replaced:
        groups = adapter_products.find_groups(model, mx.zeros((1, 2, 128)))
        assert [len(group) for group in groups] == [3, 1]
        with adapter_products.replaced_adapters(groups, quantized_matmul.is_faster_on_cpu):
            value, (tree, dx) = mx.compile(compute)(weights, x)
    else:
        value, (tree, dx) = compute(weights, x)
    model.update(weights)
    flat: list[tuple[str, mx.array]] = tree_flatten(tree)
    return [("value", value), ("x", dx), *flat]


def _require_close(found: list[tuple[str, mx.array]], expected: list[tuple[str, mx.array]], most: float) -> None:
    for (name, value), (_, wanted) in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
        assert float(mx.abs(value - wanted).max()) <= most * float(mx.abs(wanted).max()), name


@pytest.mark.parametrize(("rows", "has_bias"), [(1, True), (40, False)])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form.values())))
def test_groups_match_dense_fp32_layers(form: dict[str, Any], has_bias: bool, rows: int) -> None:
    model = _Siblings(lambda *shape: nn.QuantizedLinear.from_linear(_dense(*shape), **form), has_bias=has_bias)
    x = mx.random.normal((1, rows, 128), key=mx.random.key(3))
    found = _result(model, x, replaced=True)
    for name in ("q", "k", "v", "o"):
        layer = getattr(model, name)
        weight = mx.dequantize(layer.linear.weight, layer.linear.scales, layer.linear.get("biases"), **form)
        dense = nn.Linear(*weight.shape[::-1], bias=has_bias)
        dense.weight = weight.astype(mx.float32)
        if has_bias:
            dense.bias = layer.linear.bias
        dense.freeze()
        layer.linear = dense
    # sums of at most 128 x 40 products in fp32, in another order
    _require_close(found, _result(model, x, replaced=False), 128 * 40 * 2.0**-24)


@pytest.mark.parametrize("rows", [1, 5000])
def test_dense_frozen_layers_match_those_of_mlx_lm(rows: int) -> None:
    model = _Siblings(_dense, has_bias=True)
    x = mx.random.normal((2, rows // 2 + 1, 128), key=mx.random.key(3))
    _require_close(_result(model, x, replaced=True), _result(model, x, replaced=False), 5000 * 2.0**-24)


def test_dropout_and_trained_bases_are_left_to_mlx_lm() -> None:
    x = mx.random.normal((1, 8, 128), key=mx.random.key(3))
    dropping = _Siblings(_dense, has_bias=False, dropout=0.5)
    trained = _Siblings(_dense, has_bias=False)
    trained.k.linear.unfreeze()
    for model in (dropping, trained):
        groups = adapter_products.find_groups(model, x)
        mx.random.seed(1)
        expected = model(x)
        mx.random.seed(1)
        with adapter_products.replaced_adapters(groups, quantized_matmul.is_faster_on_cpu):
            # o's adapter beside the trained base is still in a group: other sums of 128 products in fp32
            assert float(mx.abs(model(x) - expected).max()) <= 128 * 2.0**-24 * float(mx.abs(expected).max())
            names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert "k.linear.weight" in names


def test_a_recomputed_layer_does_not_repeat_products_that_nothing_needs(tmp_path: Path) -> None:
    """The last layer's output is needed in the forward pass only; its gradient needs its input."""
    model = _Siblings(lambda *shape: nn.QuantizedLinear.from_linear(_dense(*shape)), has_bias=False)
    groups = adapter_products.find_groups(model, mx.zeros((1, 2, 128)))
    counts = {}
    for is_checkpointed in (False, True):
        call = mx.checkpoint(lambda x: model(x)) if is_checkpointed else model
        with adapter_products.replaced_adapters(groups, lambda *_: True):
            gradient = mx.grad(lambda x, call=call: call(x).sum())(mx.ones((4, 128)))
        mx.export_to_dot(str(tmp_path / "graph.dot"), gradient)
        counts[is_checkpointed] = (tmp_path / "graph.dot").read_text().count('"AddMM"')
    # one a layer and pass: three forward and four backward; recomputed, four forward, three again and four backward
    assert counts == {False: 3 + 4, True: 4 + 3 + 4}
