import math

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlxflow.kernels import adamw
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import _random


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("corrects", [True, False])
def test_adamw_update_matches_mlx(corrects: bool) -> None:
    rate, settings = 0.01, adamw.AdamWSettings(0.9, 0.95, 1e-8, 0.1)
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, bias_correction=corrects)
    theirs = {"w": _random((37,), 0)}
    optimizer.init(theirs)
    w, m, v = theirs["w"], mx.zeros(37), mx.zeros(37)
    for step in range(1, 6):
        gradient = _random((37,), step) * 10.0 ** (step - 3)
        theirs = optimizer.apply_gradients({"w": gradient}, theirs)
        first, root = (1 / (1 - 0.9**step), 1 / math.sqrt(1 - 0.95**step)) if corrects else (1.0, 1.0)
        scalars = adamw.Scalars(*(mx.array(one) for one in (rate, 0.5, True, first, root)))
        w, m, v, _ = adamw.reference(w, 2 * gradient, m, v, scalars, settings, mx.float32)
    assert mx.allclose(w, theirs["w"], rtol=1e-5, atol=1e-7)
    kept = adamw.reference(w, w, m, v, scalars._replace(keep=mx.array(False)), settings, mx.bfloat16)
    assert all(mx.array_equal(new, old) for new, old in zip(kept[:3], (w, m, v), strict=True))
    assert mx.array_equal(kept[3], w.astype(mx.bfloat16))


def test_sum_of_squares_matches_mlx() -> None:
    x = mx.array([3.0, -4.0, 12.0], mx.bfloat16)
    assert float(adamw.reference_sum_of_squares(x)) == 169
