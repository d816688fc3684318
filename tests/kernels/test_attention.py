import mlx.core as mx
import pytest

from mlxflow.kernels import attention
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import _heads, _low


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize(("heads", "shared_by", "length"), [(2, 1, 1), (3, 1, 9), (6, 3, 17)])
def test_attention_and_gradients_match_mlx(heads: int, shared_by: int, length: int, is_bounded: bool) -> None:
    q, k, v, g = _heads(2, heads, shared_by, length, 8)
    low, places = _low(length, 5) if is_bounded else None, mx.arange(length)
    sees = (places[:, None] >= places) & (places >= _low(length, 5)[:, None, :, None])

    def of_mlx(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=sees if is_bounded else "causal")

    out, lse = attention.reference(q, k, v, 0.3, low)
    values, gradients = mx.vjp(of_mlx, [q, k, v], [g])
    found = [out, *attention.reference_gradients(q, k, v, 0.3, out, lse, g, low)]
    for one, other in zip(found, [*values, *gradients], strict=True):
        assert float(mx.abs(one - other).max()) < 2e-5 * max(1.0, float(mx.abs(other).max()))


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "is_taken"),
    [
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 64), 0.1, True),
        ((2, 6, 40, 16), (2, 6, 40, 16), (2, 6, 40, 16), 0.1, True),
        ((2, 6, 40, 24), (2, 6, 40, 24), (2, 6, 40, 24), 0.1, False),
        ((2, 6, 40, 144), (2, 6, 40, 144), (2, 6, 40, 144), 0.1, False),
        ((2, 6, 40, 64), (2, 4, 40, 64), (2, 4, 40, 64), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 80, 64), (2, 2, 80, 64), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 32), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 64), 0.0, False),
    ],
)
def test_supports_names_the_shapes_that_attention_takes(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], scale: float, is_taken: bool
) -> None:
    queries, keys, values = (mx.zeros(shape, mx.bfloat16) for shape in (q, k, v))
    assert attention.supports(queries, keys, values, scale) == is_taken
    assert not attention.supports(queries.astype(mx.float16), keys, values, scale)
