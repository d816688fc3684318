from typing import cast

import mlx.core as mx

from mlxflow.ops.random_state import put_random_key, same_random_state


def test_a_block_leaves_the_random_state_as_it_was() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    with same_random_state():
        assert mx.random.uniform(shape=(4,)).tolist() == expected
        mx.random.normal((2,))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_key_gives_the_numbers_that_followed_it() -> None:
    mx.random.seed(2**40 + 5)
    (state,) = cast("list[mx.array]", mx.random.state)
    key = mx.array(state)
    expected = mx.random.uniform(shape=(4,)).tolist()
    put_random_key(key)
    assert mx.random.uniform(shape=(4,)).tolist() == expected
