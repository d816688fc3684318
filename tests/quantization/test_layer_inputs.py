import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.quantization.layer_inputs import input_products, other_weights, remove_weights


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.gate = nn.Embedding(10, 32), nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed(tokens)
        logits: mx.array = self.embed.as_linear(self.down(self.up(hidden) * self.gate(hidden)))
        return logits


TOKENS = mx.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_products_of_inputs_are_sums_over_all_rows() -> None:
    model = _Model()

    def run(begin: int, end: int) -> mx.array:
        y: mx.array = model(TOKENS[begin:end])
        return y

    found = input_products(model, ["embed", "up", "gate", "down"], run, [(0, 2), (2, 3)])
    hidden = model.embed(TOKENS).reshape(-1, 32)
    inner = model.up(hidden) * model.gate(hidden)
    last = model.down(inner)
    for path, x in (("embed", last), ("up", hidden), ("gate", hidden), ("down", inner)):
        assert mx.allclose(found[path], x.T @ x, rtol=1e-4, atol=1e-5)
    assert found["up"] is found["gate"]  # which read one array
    assert type(model.up) is nn.Linear


def test_other_weights_are_undone_after_an_error() -> None:
    model = _Model()
    before = model.up.weight

    def fail() -> None:
        with other_weights(model, {"up": mx.zeros((64, 32))}):
            assert not model.up.weight.any().item()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert model.up.weight is before


def test_removed_weights_are_gone() -> None:
    model = _Model()
    remove_weights(model)
    assert not [value for module in model.modules() for value in module.values() if isinstance(value, mx.array)]
