import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.kernels import rotary
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import PLAIN, TYPES, _close, _random, _tolerance


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 24])
def test_rotary_matches_mlx(width: int, interleaved: bool, dtype: mx.Dtype) -> None:
    x, g = _random((2, 3, 7, width), 0, dtype), _random((2, 3, 7, width), 1, dtype)
    layer = nn.RoPE(16, traditional=interleaved)
    known = layer(rotary.ones_and_zeros(16, 7, interleaved=interleaved))
    cosine, sine = (part[0, 0] for part in rotary.pairs(known, interleaved=interleaved))
    function = rotary.rotary(interleaved, PLAIN)
    found = mx.vjp(lambda x: function(x, cosine, sine), [x], [g])
    wanted = mx.vjp(layer, [x], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(dtype))
