import mlx.core as mx
import pytest

from mlxflow.kernels import kernel_names


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        (kernel_names.rms_norm_name(mx.bfloat16, 576, is_frozen=False), True),
        (kernel_names.rms_norm_name(mx.float32, 8200, is_frozen=False), False),
        (kernel_names.rms_norm_name(mx.float32, 12, is_frozen=False), False),
        (kernel_names.rms_norm_name(mx.float16, 576, is_frozen=False), False),
        (kernel_names.attention_name(mx.bfloat16, 64, is_bounded=False), True),
        (kernel_names.attention_name(mx.float32, 64, is_bounded=True), False),
        (kernel_names.attention_name(mx.bfloat16, 256, is_bounded=True), False),
        (kernel_names.rotary_name(mx.float32, 32, interleaved=True), True),
        (kernel_names.rotary_name(mx.float32, 24, interleaved=False), False),
        (kernel_names.embedding_name(mx.bfloat16), True),
        (kernel_names.cross_entropy_name(mx.float16), False),
    ],
)
def test_is_known_follows_dtype_and_width(name: str, is_known: bool) -> None:
    assert kernel_names.is_known(name) is is_known


def test_names_differ_by_variant_type_and_width() -> None:
    names = [
        *(kernel_names.attention_name(mx.bfloat16, 64, is_bounded=bounded) for bounded in (False, True)),
        *(kernel_names.rotary_name(mx.bfloat16, 64, interleaved=interleaved) for interleaved in (False, True)),
        *(kernel_names.gated_name(activation, mx.bfloat16) for activation in ("silu", "gelu")),
        *(kernel_names.mlp_name(activation, mx.bfloat16) for activation in ("silu", "gelu")),
        *(kernel_names.adamw_name(mx.float32, gradients) for gradients in (mx.float32, mx.bfloat16)),
        *(kernel_names.rms_norm_name(mx.bfloat16, width, is_frozen=False) for width in (64, 128)),
    ]
    assert len(set(names)) == len(names)
