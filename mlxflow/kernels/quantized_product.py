"""Products of many rows with a frozen quantized weight, through a dense copy: no kernel of ours, but verified like one.

MLX's product with packed codes is made for the few rows of decoding. For thousands of rows a dense copy, written for
one product, costs little: 8 billion weights are 16 GB in bf16, which a GPU writes in some ms, and the dense product
runs at the pace of its matrix units. Whether that pays depends on the device, the shape and the number of rows, so each
shape is verified and timed against `mx.quantized_matmul`, forward and gradient of the rows.

A name holds: `quantized_product/DTYPE/MODE/BITS/GROUP_SIZE/N/D/ROWS`, for rows x (R, D) and codes of (N, D) numbers. A
large N stands for one of its slices. ROWS is the least number of rows of a class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxflow.ops import quantized_matmul
from mlxflow.ops.quantized_matmul import Format

KIND = "quantized_product"

#: The least rows of each class of row counts; fewer rows are left to MLX.
ROW_CLASSES = (256, 2048)


class ProductShape(NamedTuple):
    """What the choice depends on.

    Attributes:
        dtype: of the rows.
        form: of the weight.
        outputs: N, at most a slice.
        inputs: D.
        rows: the least of the class.
    """

    dtype: mx.Dtype
    form: Format
    outputs: int
    inputs: int
    rows: int

    @property
    def name(self) -> str:
        """The name for verification."""
        dtype = str(self.dtype).rpartition(".")[2]
        form = f"{self.form.mode}/{self.form.bits}/{self.form.group_size}"
        return f"{KIND}/{dtype}/{form}/{self.outputs}/{self.inputs}/{self.rows}"

    @classmethod
    def of(cls, dtype: mx.Dtype, parts: Sequence[str]) -> "ProductShape":
        """Return the shape of a name.

        Args:
            dtype: of the rows.
            parts: of the name after the dtype.
        """
        mode, bits, group_size, outputs, inputs, rows = parts
        return cls(dtype, Format(int(group_size), int(bits), mode), int(outputs), int(inputs), int(rows))


def shape_of(dtype: mx.Dtype, codes: mx.array, form: Format, rows: int) -> ProductShape | None:
    """Return the shape of a product; None if it is left to MLX: few rows, or a format by MLX's defaults.

    Args:
        dtype: of the rows.
        codes: packed, of (N, D) numbers.
        form: of the weight.
        rows: R.
    """
    least = max((number for number in ROW_CLASSES if number <= rows), default=0)
    if not least or form.bits is None or form.group_size is None:
        return None
    outputs = min(len(codes), quantized_matmul.SLICE_ROWS)
    return ProductShape(dtype, form, outputs, codes.shape[1] * 32 // form.bits, least)


def inputs(shape: ProductShape, _: int = 0, *, more_rows: int = 0) -> list[mx.array]:
    """Return rows, the incoming gradient, what is added to the gradient of the rows, codes, scales and biases.

    The rows are as many as the class has at least, however many numbers are wanted: which way MLX multiplies, and how
    fast, depends on them.

    Args:
        shape: of the product.
        more_rows: beside those of the class.
    """
    rows = shape.rows + more_rows
    scale = mx.where(mx.arange(shape.outputs) % 7 == 3, 30.0, 1.0)[:, None]
    dense = mx.random.normal((shape.outputs, shape.inputs), key=mx.random.key(0)) * scale
    x, incoming, plus = (
        mx.random.normal((rows, width), key=mx.random.key(seed)).astype(shape.dtype)
        for seed, width in ((1, shape.inputs), (2, shape.outputs), (3, shape.inputs))
    )
    weight: list[mx.array] = list(mx.quantize(dense.astype(shape.dtype), **shape.form._asdict()))
    return [x, incoming, plus, *weight]


def kernel(shape: ProductShape, x: mx.array, incoming: mx.array, plus: mx.array, *weight: mx.array) -> list[mx.array]:
    """Return the product, the gradient of its rows, and that with an addition; each through a dense copy of the weight.

    An adapter's part of the gradient is added within the product (`ops.adapter_products`).
    """
    return [
        quantized_matmul.multiply(x, weight, shape.form, transpose=True),
        quantized_matmul.multiply(incoming, weight, shape.form, transpose=False),
        quantized_matmul.multiply(incoming, weight, shape.form, transpose=False, plus=plus),
    ]


def reference(
    shape: ProductShape, x: mx.array, incoming: mx.array, plus: mx.array, *weight: mx.array
) -> list[mx.array]:
    """Return the same by dense products in fp32."""
    codes, scales, *biases = weight
    dense = mx.dequantize(codes, scales, biases[0] if biases else None, **shape.form._asdict()).astype(mx.float32)
    gradient = incoming.astype(mx.float32) @ dense
    return [x.astype(mx.float32) @ dense.T, gradient, gradient + plus.astype(mx.float32)]


def mlx(shape: ProductShape, x: mx.array, incoming: mx.array, plus: mx.array, *weight: mx.array) -> list[mx.array]:
    """Return the same by MLX's product with packed codes."""
    codes, scales, *biases = weight
    packed = (codes, scales, biases[0] if biases else None)
    form = shape.form._asdict()
    return [
        mx.quantized_matmul(x, *packed, transpose=True, **form),
        mx.quantized_matmul(incoming, *packed, transpose=False, **form),
        plus + mx.quantized_matmul(incoming, *packed, transpose=False, **form),
    ]
