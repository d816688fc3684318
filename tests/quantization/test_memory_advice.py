"""A request that exceeds the memory limit is told which method fits."""

from typing import Any

from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.memory_advice import memory_advice
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.settings import Setting
from tests.quantization.test_work_counts import request_of

SIZES = {"dwq": 140.0, "block": 8.7, "awq": 6.8, "gptq": 9.1, "rtn": 5.3}


def _size(request: QuantizationRequest) -> float:
    whole = 100.0 if request.scale_steps else 0.0
    return (SIZES[request.method] + whole + (2.0 if request.budget else 0.0)) * 1e9


def _advice(request: QuantizationRequest, limit: float, *, learns_blocks: bool = True) -> str:
    limit_bytes = int(limit * 1e9)
    return memory_advice(request, _size, limit_bytes=limit_bytes, learns_blocks=learns_blocks, task="quantize")


def test_the_most_accurate_method_that_fits_is_named() -> None:
    dwq = request_of("dwq")
    assert _advice(dwq, 12.8) == (
        'quantize: about 140 GB is more than the memory limit of 12.8 GB. Set method = "block": it takes about 8.70 GB.'
    )
    assert 'Set method = "awq": it takes about 6.80 GB.' in _advice(dwq, 7)
    assert 'Set method = "rtn": it takes about 5.30 GB.' in _advice(dwq, 6)
    assert 'Set method = "rtn": ' in _advice(dwq, 12.8, learns_blocks=False)
    assert _advice(dwq, 4) == (
        'quantize: about 140 GB is more than the memory limit of 4.00 GB, and method = "rtn", which takes least, '
        "takes about 5.30 GB. Raise the limit."
    )


def test_a_part_that_can_be_left_out_comes_before_another_method() -> None:
    assert "Set scale_steps = 0: it takes about 8.70 GB." in _advice(request_of("block", scale_steps=9), 12.8)
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert 'Set method = "rtn" and no budget: it takes about 5.30 GB.' in _advice(request_of("rtn", budget=budget), 6)


def test_gptq_is_named_only_for_settings_that_it_has() -> None:
    def size(request: QuantizationRequest) -> float:
        return 5e9 if request.method == "gptq" else 20e9

    named: dict[str, Any] = {"limit_bytes": int(6e9), "learns_blocks": True, "task": "quantize"}
    assert 'Set method = "gptq"' in memory_advice(request_of("dwq"), size, **named)
    for setting in (Setting("affine", 3, 64), Setting("mxfp4", 4, 32)):
        assert "gptq" not in memory_advice(request_of("dwq", default=setting), size, **named)


def test_nothing_is_named_where_the_least_method_does_not_fit() -> None:
    assert _advice(request_of("rtn"), 2, learns_blocks=False) == (
        "quantize: about 5.30 GB is more than the memory limit of 2.00 GB. Raise the limit."
    )
