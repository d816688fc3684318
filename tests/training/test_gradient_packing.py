import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training import flat_parameters, gradient_packing
from mlxflow.training.flat_parameters import FlatLayout
from mlxflow.training.gradient_packing import GradientPacking, Gradients


def _gradients() -> Gradients:
    draw = np.random.default_rng(1).standard_normal
    tree = {
        "embed": {"weight": mx.array(draw((40, 8)).astype(np.float32))},
        "layers": [
            {"w": mx.array(draw((8, 16)).astype(np.float32)), "norm": mx.array(draw(8).astype(np.float32))}
            for _ in range(5)
        ],
        "norm": mx.array(draw(8).astype(np.float32)),
    }
    return Gradients(mx.array(3.5), mx.array(7.0), tree)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_packing, "_FEW", 100)
    monkeypatch.setattr(flat_parameters, "_FEW", 100)


def test_parts_come_in_the_order_of_the_backward_pass_with_all_small_ones_last() -> None:
    gradients = _gradients()
    packed = GradientPacking(gradients.tree, FlatLayout(gradients.tree, parts=3)).pack(gradients)
    assert [array.size for array in packed] == [8 * 16, 2 * 8 * 16, 2 * 8 * 16, 40 * 8, 2 + 6 * 8]
    last = [np.array(gradients.tree["layers"][layer]["w"]).reshape(-1) for layer in (2, 3)]
    assert np.array_equal(np.array(packed[1]), np.concatenate(last))
    assert np.array_equal(np.array(packed[3]), np.array(gradients.tree["embed"]["weight"]).reshape(-1))
    assert packed[-1][:2].tolist() == [3.5, 7.0]


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_unpacked_sums_are_the_long_arrays_of_the_update(parts: int) -> None:
    gradients = _gradients()
    layout = FlatLayout(gradients.tree, parts=parts)
    packing = GradientPacking(gradients.tree, layout)
    found = packing.unpack([[array[:3], array[3:]] for array in packing.pack(gradients)])
    expected = layout.gather(gradients.tree)
    assert (found.total.item(), found.targets.item()) == (3.5, 7.0)
    assert found.arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert found.arrays[name].shape == array.shape
        assert np.array_equal(np.array(found.arrays[name]), np.array(array)), name


def test_an_update_without_long_arrays_gets_the_tree() -> None:
    gradients = _gradients()
    packing = GradientPacking(gradients.tree, None)
    found = dict(tree_flatten(packing.unpack([[array[:3], array[3:]] for array in packing.pack(gradients)]).arrays))
    expected = dict(tree_flatten(gradients.tree))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(np.array(found[path]), np.array(array)) for path, array in expected.items())
