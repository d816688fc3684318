import os
import sys
from typing import Any

import mlx.core as mx
import pytest

from tests.metal.capture import MetalSource, Parameter, capture

pytestmark = pytest.mark.usefixtures("compiler")


def _captured(numbers: int, dtype: mx.Dtype = mx.float32) -> MetalSource:
    kernel: Any = mx.fast.metal_kernel(
        name=f"twice_{numbers}",
        input_names=["x", "s"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; if (i < x_shape[0]) y[i] = x[i] * s * FACTOR;\n",
        header="// the header\n",
    )
    call = {
        "grid": (32, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(numbers,)],
        "output_dtypes": [dtype],
        "template": [("FACTOR", 2), ("T", dtype)],
    }
    return capture(kernel, [mx.zeros(numbers, dtype), mx.array(1.0)], call)


def test_the_captured_source_is_what_mlx_would_compile() -> None:
    source = _captured(9)
    name = source.instance.partition("<")[0]
    assert source.text == (
        "// the header\n"
        "template <int FACTOR, typename T>\n"
        f"[[kernel]] void {name}(\n"
        "  const device float* x [[buffer(0)]],\n"
        "  const constant int* x_shape [[buffer(1)]],\n"
        "  const constant float& s [[buffer(2)]],\n"
        "  device float* y [[buffer(3)]],\n"
        "  uint3 thread_position_in_grid [[thread_position_in_grid]]) {\n"
        "uint i = thread_position_in_grid.x; if (i < x_shape[0]) y[i] = x[i] * s * FACTOR;\n"
        "\n}\n\n"
        f'template [[host_name("{name}")]] [[kernel]] decltype({source.instance}) {source.instance};\n\n'
    )
    assert source.definitions + source.text[source.text.index("template [[host") :] == source.text
    assert source.parameters[1:] == [
        Parameter("const constant int*", "x_shape", "buffer"),
        Parameter("const constant float&", "s", "buffer"),
        Parameter("device float*", "y", "buffer"),
        Parameter("uint3", "thread_position_in_grid", "thread_position_in_grid"),
    ]


@pytest.mark.parametrize(("numbers", "space"), [(7, "constant"), (8, "device")])
def test_mlx_passes_an_input_of_fewer_than_8_numbers_in_constant_memory(numbers: int, space: str) -> None:
    assert _captured(numbers, mx.bfloat16).parameters[0].type == f"const {space} bfloat16_t*"


def test_capturing_leaves_standard_output_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = os.fstat(1)
    _captured(5)
    assert os.fstat(1) == before
    print("after")
    sys.stdout.flush()
    assert capfd.readouterr().out == "after\n"
