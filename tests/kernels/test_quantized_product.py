"""Products with quantized weights through a dense copy: verified and timed like a kernel, chosen by shape and rows."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.kernels import kernel_names, model_kernels, quantized_product, verification
from mlxflow.kernels.model_kernels import TrainingTraits
from mlxflow.kernels.quantized_product import ProductShape
from mlxflow.kernels.verification_cases import case_of
from mlxflow.ops import quantized_matmul
from mlxflow.ops.quantized_matmul import Format

NAME = "quantized_product/bfloat16/affine/4/64/256/128/256"
FORMATS = [
    *[Format(size, bits, "affine") for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)],
    Format(32, 4, "mxfp4"),
    Format(32, 8, "mxfp8"),
    Format(16, 4, "nvfp4"),
]


def _ticks(*seconds: float) -> Callable[[], float]:
    """Return a clock by which calls of the kernel and of MLX take these seconds in turn, after both warm up."""

    def times() -> Iterator[float]:
        now = 0.0
        while True:
            for each in seconds:
                yield now
                now += each
                yield now

    return partial(next, times())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.mode}-{form.bits}-{form.group_size}")
def test_both_ways_match_the_reference(form: Format, dtype: mx.Dtype) -> None:
    shape = ProductShape(dtype, form, 256, 128, 256)
    case = case_of(shape.name)
    for arrays in case.checked_inputs(1 << 12):
        expected = case.reference(*arrays)
        ways = [case.kernel(*arrays)]
        if dtype == mx.float32:  # in 16-bit types MLX adds up in that type on the CPU
            ways.append(quantized_product.mlx(shape, *arrays))
        for found in ways:
            for value, wanted in zip(found, expected, strict=True):
                assert verification._deviation(value, wanted) <= case.tolerance


def test_a_faster_product_is_used_and_a_slower_one_is_not() -> None:
    case = case_of(NAME)
    assert verification.verify(case, clock=_ticks(1.0, 3.0)).passed
    slow = verification.verify(case, clock=_ticks(2.0, 1.0))
    assert not slow.passed
    assert "it takes" in slow.reason


@pytest.mark.parametrize(
    "fault",
    [
        lambda product, gradient, added: [product, gradient * 1.02, added],
        lambda product, gradient, added: [product, mx.concatenate([gradient[1:], gradient[:1]]), added],
        lambda product, gradient, added: [
            mx.concatenate([product[:, :-1], product[:, :1]], axis=1),
            gradient,
            added,
        ],
        lambda product, gradient, added: [product, mx.where(mx.arange(gradient.shape[1]) == 5, 0, gradient), added],
        lambda product, gradient, _: [product, gradient, gradient],
        lambda product, *others: [mx.where(mx.arange(len(product))[:, None] >= 64, 0, product), *others],
        lambda product, *others: [mx.where(mx.arange(len(product))[:, None] >= 256, 0, product), *others],
    ],
    ids=[
        "scaled",
        "rows shifted",
        "last column",
        "column left out",
        "addition left out",
        "rows after the 64th",
        "rows that fill no block",
    ],
)
def test_a_wrong_product_is_refused(fault: Callable[..., list[mx.array]]) -> None:
    right = case_of(NAME)
    wrong = right._replace(kernel=lambda *arrays: fault(*right.kernel(*arrays)))
    result = verification.verify(wrong, clock=_ticks(1.0, 3.0))
    assert not result.passed
    assert "it deviates by" in result.reason


@pytest.mark.parametrize("shape", [ProductShape(mx.bfloat16, Format(64, 4, "affine"), 64, 16_384, 256)])
@pytest.mark.parametrize("size", [1 << 10, 1 << 18, 1 << 24])
def test_a_product_is_checked_and_timed_with_the_rows_of_its_class(shape: ProductShape, size: int) -> None:
    case = case_of(shape.name)
    assert len(case.inputs(size)[0]) == shape.rows
    assert [len(arrays[0]) for arrays in case.checked_inputs(size)] == [shape.rows, shape.rows + 37]


def test_a_large_weight_is_multiplied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_matmul, "SLICE_ROWS", 100)
    written: list[tuple[int, ...]] = []
    plain = quantized_matmul.dequantize

    def dequantize(weight: tuple[mx.array, ...], form: Format) -> mx.array:
        written.append(tuple(weight[0].shape))
        return plain(weight, form)

    shape = ProductShape(mx.float32, Format(64, 4, "affine"), 256, 128, 256)
    arrays = quantized_product.inputs(shape)
    expected = quantized_product.reference(shape, *arrays)
    monkeypatch.setattr(quantized_matmul, "dequantize", dequantize)
    for value, wanted in zip(quantized_product.kernel(shape, *arrays), expected, strict=True):
        assert verification._deviation(value, wanted) <= 2e-5
    assert [rows for rows, _ in written] == [100, 100, 56] * 3


def test_names_hold_the_shape_and_a_class_of_row_counts() -> None:
    codes, form = mx.zeros((256, 16), mx.uint32), Format(64, 4, "affine")
    for rows, expected in ((255, None), (256, 256), (2047, 256), (2048, 2048), (8192, 2048)):
        shape = quantized_product.shape_of(mx.bfloat16, codes, form, rows)
        assert (shape and shape.rows) == expected
    shape = quantized_product.shape_of(mx.bfloat16, codes, form, 300)
    assert shape is not None
    assert shape.name == NAME
    assert kernel_names.is_known(shape.name)
    assert ProductShape.of(mx.bfloat16, NAME.split("/")[2:]) == shape
    assert quantized_product.shape_of(mx.bfloat16, codes, Format(None, None, "affine"), 300) is None


def test_a_recorded_selection_decides_for_each_shape_and_number_of_rows() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    nn.quantize(model, group_size=64, bits=4)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    names = model_kernels._quantized_products(model, mx.bfloat16)
    pair = ("256/128", "128/256")
    assert names == {f"quantized_product/bfloat16/affine/4/64/{n}/{rows}" for n in pair for rows in (256, 2048)}
    model.freeze()
    use = model_kernels.recorded_for(model, TrainingTraits("bf16", 64, is_deterministic=False), [NAME])
    assert use.selected == [NAME]
    assert use.is_faster_dense is not None
    first, second = (layer.weight for layer in model.layers)
    form = Format(64, 4, "affine")
    decide = [
        use.is_faster_dense(mx.zeros((2, rows, width), mx.bfloat16), codes, True, form)
        for rows, width, codes in ((128, 128, first), (1024, 128, first), (10, 128, first), (128, 256, second))
    ]
    assert decide == [True, False, False, False]
    assert (
        model_kernels.recorded_for(model, TrainingTraits("bf16", 64, is_deterministic=False), []).is_faster_dense
        is None
    )
