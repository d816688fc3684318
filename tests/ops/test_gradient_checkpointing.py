import mlx.core as mx
import mlx.optimizers as optim

from mlxflow.ops.gradient_checkpointing import recomputed
from tests.training.test_step import _difference, _marks, _model, _step


def test_checkpointed_layers_give_the_same_gradient_and_are_restored() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    model = _model()
    kind = type(model.layers[0])
    plain = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
    calls = []
    for every, expected in ((1, [True, True]), (2, [True, False])):
        with recomputed(model, every=every):
            calls.append([type(layer) is not kind for layer in model.layers])
            again = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
            assert _difference(again, plain) < 1e-6
        assert calls[-1] == expected
        assert all(type(layer) is kind for layer in model.layers)
