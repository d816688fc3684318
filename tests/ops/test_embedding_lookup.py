import mlx.core as mx
import pytest

from mlxflow.ops.embedding_lookup import by_number, lookup, ordered_gradient


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (4, 33), (2, 3, 5)])
def test_lookup_and_its_gradient_match_indexing(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    table = mx.random.normal((11, 6), key=mx.random.key(0)).astype(dtype)
    numbers = mx.random.randint(0, 10, shape, key=mx.random.key(1))  # the last row is never looked up
    incoming = mx.random.normal((*shape, 6), key=mx.random.key(2)).astype(dtype)
    (found,), (gradient,) = mx.vjp(lambda table: lookup(table, numbers), [table], [incoming])
    assert mx.array_equal(found, table[numbers])
    assert gradient.dtype == dtype
    wanted = mx.zeros((11, 6)).at[numbers.reshape(-1)].add(incoming.astype(mx.float32).reshape(-1, 6))
    assert mx.allclose(gradient.astype(mx.float32), wanted, rtol=1e-2 if dtype == mx.bfloat16 else 1e-5, atol=1e-5)
    assert not gradient[10].any()


def test_gradients_of_a_repeated_id_are_summed_in_fp32() -> None:
    incoming = mx.full((3000, 2), 1 / 256, mx.bfloat16)
    assert ordered_gradient(mx.full((3000,), 2), incoming, 4).tolist() == [[0, 0], [0, 0], [11.75, 11.75], [0, 0]]


@pytest.mark.parametrize("count", [50, 2**31])  # of which the keys are of 32 and of 64 bits
def test_sorting_by_id_is_stable(count: int) -> None:
    found, order = by_number(mx.array([3, 1, 3, 0, 1, 3]), count)
    assert found.tolist() == [0, 1, 1, 3, 3, 3]
    assert order.tolist() == [3, 1, 4, 0, 2, 5]
