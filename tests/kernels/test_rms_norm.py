import mlx.core as mx
import pytest

from mlxflow.kernels import rms_norm
from tests.kernels.stand_ins import uncompiled, use_references  # noqa: F401
from tests.kernels.test_verification_cases import PLAIN, TYPES, _close, _random, _scaled, _tolerance

WIDTHS = [7, 8, 12, 576]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_and_gradients_match_mlx(width: int, dtype: mx.Dtype) -> None:
    x, w, g = _scaled((2, 8, width), 0, dtype), _random((width,), 1, dtype), _random((2, 8, width), 2, dtype)
    for function in (lambda x, w: rms_norm.reference(x, w, 1e-5), rms_norm.rms_norm(1e-5, PLAIN)):
        found = mx.vjp(function, [x, w], [g])
        wanted = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), [x, w], [g])
        for ours, theirs in zip(found, wanted, strict=True):
            _close(ours, theirs, _tolerance(dtype))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
def test_sum_rms_norm_with_a_used_sum_matches_mlx(dtype: mx.Dtype) -> None:
    x, r, past, g = (_scaled((2, 4, 24), seed, dtype) for seed in range(4))
    weight = (1 + 0.3 * _random((24,), 5)).astype(dtype)

    def of_mlx(x: mx.array, r: mx.array, weight: mx.array) -> list[mx.array]:
        h = x + r
        return [h, mx.fast.rms_norm(h, weight, 1e-5)]

    found = mx.vjp(rms_norm.sum_and_norm(1e-5, PLAIN), [x, r, weight], [past, g])
    wanted = mx.vjp(of_mlx, [x, r, weight], [past, g])
    alone = mx.vjp(rms_norm.residual_and_norm(1e-5, PLAIN), [x + r, weight], [past, g])
    for ours, theirs, without in zip(found, wanted, alone, strict=True):
        _close(ours, theirs, _tolerance(dtype))
        _close(without, theirs if len(without) == len(theirs) else [theirs[0], theirs[2]], _tolerance(dtype))


@pytest.mark.usefixtures("uncompiled")
def test_a_frozen_weight_has_the_gradient_of_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_references(monkeypatch)
    x, r, past, g = (_scaled((2, 4, 24), seed, mx.float32) for seed in range(4))
    weight = 1 + 0.3 * _random((24,), 5)
    functions = (rms_norm.rms_norm, rms_norm.residual_and_norm)
    for function, incoming in zip(functions, ([g], [past, g]), strict=True):
        trained, frozen = (function(1e-5, mx.float32, is_frozen=is_frozen) for is_frozen in (False, True))
        wanted = mx.vjp(trained, [x, weight], incoming)[1]
        dx, d_weight = mx.vjp(frozen, [x, weight], incoming)[1]
        assert mx.array_equal(dx, wanted[0])
        assert not d_weight.any()
    of_sum = mx.vjp(rms_norm.sum_and_norm(1e-5, mx.float32, is_frozen=True), [x, r, weight], [past, g])[1]
    wanted = mx.vjp(rms_norm.sum_and_norm(1e-5, mx.float32), [x, r, weight], [past, g])[1]
    assert all(mx.array_equal(one, other) for one, other in zip(of_sum[:2], wanted[:2], strict=True))
    assert calls["rms_norm.kernel_frozen_gradient"] == calls["rms_norm.kernel_gradients"] == 1
    assert calls["rms_norm.kernel_sum_frozen_gradient"] == calls["rms_norm.kernel_sum_gradients"] == 2


@pytest.mark.parametrize(
    ("x", "is_taken"),
    [
        (mx.zeros((3, 8)), True),
        (mx.zeros((3, 8), mx.bfloat16), True),
        (mx.zeros((3, 8), mx.float16), False),
        (mx.zeros((3, 12)), False),
        (mx.zeros((3, 8200)), False),
        (mx.zeros(8), False),
        (mx.zeros((0, 8)), False),
    ],
)
def test_unsupported_norms_use_the_reference(x: mx.array, is_taken: bool) -> None:
    assert rms_norm.supports(x) == is_taken
