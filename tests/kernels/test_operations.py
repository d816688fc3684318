import mlx.core as mx
import pytest

from mlxflow.kernels.operations import operation
from mlxflow.kernels.proof import _deviation, prove

NAMES = [
    f"{kind}/{dtype}{rest}"
    for dtype in ("float32", "bfloat16")
    for kind, rest in [
        ("rms_norm", "/64"),
        ("gated_silu", ""),
        ("gated_gelu", ""),
        ("gated_gelu_approx", ""),
        ("cross_entropy", ""),
        ("adamw", "/bfloat16"),
        ("sum_of_squares", ""),
    ]
]


@pytest.mark.parametrize("name", [name for name in NAMES if "float32" in name])
def test_the_reference_is_what_mlx_computes(name: str) -> None:
    tried = operation(name)
    inputs = tried.inputs(1 << 12)
    for ours, theirs in zip(tried.reference(*inputs), tried.own(*inputs), strict=True):
        assert _deviation(ours, theirs) < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_what_the_reference_computes(name: str) -> None:
    outcome = prove(operation(name))
    assert 0 <= outcome.error <= operation(name).tolerance, outcome
    mx.clear_cache()
