"""Our SwiGLU on the CPU, against mlx-lm's."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama, qwen3
from mlx_lm.models.activations import swiglu as theirs

from mlxflow.ops.swiglu_cpu import replaced_swiglu, swiglu

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="serves on the CPU only")


def test_swiglu_and_gradients_match_mlx_lm() -> None:
    gate, x, incoming = (mx.random.normal((5, 33), key=key) * 4 for key in mx.random.split(mx.random.key(0), 3))
    gate[0, :4] = mx.array([-1e4, 1e4, 0.0, -95.0])

    def results(function: object) -> list[mx.array]:
        assert callable(function)
        loss = mx.value_and_grad(lambda gate, x: (function(gate, x) * incoming).sum(), argnums=(0, 1))
        return [function(gate, x), *mx.compile(loss)(gate, x)[1]]

    for found, expected in zip(results(swiglu), results(theirs), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=2e-6, atol=1e-6)


def test_models_use_the_cpu_swiglu_until_the_context_ends() -> None:
    gate, x = mx.random.normal((2, 8, 16), key=mx.random.key(1))
    with replaced_swiglu():
        assert llama.swiglu is qwen3.swiglu is not theirs
        assert mx.array_equal(llama.swiglu(gate, x), swiglu(gate, x))
        half = gate.astype(mx.bfloat16), x.astype(mx.bfloat16)
        assert mx.array_equal(llama.swiglu(*half), theirs(*half))
    assert llama.swiglu is qwen3.swiglu is theirs
