import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.training import flat_parameters
from mlxflow.training.flat_parameters import FlatLayout, sum_of_squares


def _tree() -> dict[str, object]:
    return {
        "norm": mx.arange(5.0),
        "layers": [
            {"weight": mx.arange(6.0).reshape(2, 3)},
            {"weight": mx.arange(24).astype(mx.bfloat16).reshape(2, 3, 4)},
        ],
        "head": mx.arange(8.0).reshape(4, 2) - 9,
    }


def test_gathered_parameters_are_scattered_back_unchanged() -> None:
    tree = _tree()
    layout = FlatLayout(tree)
    long = layout.gather(tree)
    assert {name: (value.shape, value.dtype) for name, value in long.items()} == {
        "vectors_float32": ((5,), mx.float32),
        "matrices_float32": ((1, 14), mx.float32),
        "matrices_bfloat16": ((1, 24), mx.bfloat16),
    }
    back = dict(tree_flatten(layout.scatter(long)))
    expected = dict(tree_flatten(tree))
    assert back.keys() == expected.keys()
    assert all(
        back[name].shape == value.shape and mx.array_equal(back[name], value) for name, value in expected.items()
    )


def test_views_take_no_memory_of_their_own() -> None:
    tree = {"a": mx.zeros((256, 1024)), "b": mx.ones((256, 1024))}
    layout = FlatLayout(tree)
    long = layout.gather(tree)
    mx.eval(long)
    del tree
    before = mx.get_active_memory()
    views = layout.scatter(long)
    mx.eval(views)
    assert mx.get_active_memory() == before
    assert mx.array_equal(views["b"], mx.ones((256, 1024)))


@pytest.mark.parametrize("size", [3, 1024, 2**20 + 5])  # one long sum of the last is off by 5e-4
def test_squares_are_summed_in_fp32_without_losing_digits(size: int) -> None:
    numbers = mx.random.normal((size,), key=mx.random.key(0)).astype(mx.bfloat16)
    exact = np.square(np.array(numbers.astype(mx.float32)).astype(np.float64)).sum()
    assert float(sum_of_squares(numbers)) == pytest.approx(exact, rel=1e-5)


def test_many_numbers_are_several_long_arrays_of_whole_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_parameters, "_FEW", 10)
    tree = {"embed": mx.ones((40, 8)), "layers": [{"w": mx.full((8, 16), float(n))} for n in range(5)]}
    layout = FlatLayout(tree, parts=3)
    long = layout.gather(tree)
    assert {name: array.size for name, array in long.items()} == {
        "matrices_float32_0": 320,
        "matrices_float32_1": 256,
        "matrices_float32_2": 256,
        "matrices_float32_3": 128,
    }
    back = dict(tree_flatten(layout.scatter(long)))
    assert all(mx.array_equal(back[path], leaf) for path, leaf in tree_flatten(tree))


def test_a_long_array_has_fewer_numbers_than_mlx_can_index() -> None:
    leaves: list[flat_parameters.Leaf] = [(str(number), (4096, 14336)) for number in range(200)]
    sizes = [sum(4096 * 14336 for _ in group) for group in flat_parameters.split_leaves(leaves)]
    assert max(sizes) < 2**31
    assert sum(sizes) == 200 * 4096 * 14336
