from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.quality import QualityLimits
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.work_forecast import (
    ModelShape,
    described,
    kind_of,
    operations_per_second,
    predicted,
    work_of,
)
from mlxflow.quantization.work_records import WorkRecord, read_records
from tests.small_models import llama
from tests.stages.test_quantize import Job
from tests.stages.test_quantize import job as job  # a fixture


def _shape() -> ModelShape:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    return ModelShape.of(model, 60)


def _request(method: str, **changes: Any) -> QuantizationRequest:
    return QuantizationRequest(
        method=method,
        default=Setting("affine", 4, 64),
        rules=[],
        calibration_rows=changes.pop("rows", 16),
        budget=None,
        training=None,
        limits=QualityLimits(8, 0.0, 0.0),
        batch_size=4,
        token_stage="pretokenize",
        start=None,
        block_steps=10,
        scale_steps=0,
        rotations=0,
    )._replace(**changes)


def _work(method: str, **changes: Any) -> Any:
    return work_of(_request(method, **changes), _shape(), row_tokens=32, num_rows=64, validation_rows=8)


def test_the_sizes_are_those_of_the_model() -> None:
    shape = _shape()
    assert shape.num_blocks == 2
    assert shape.parameters - shape.blocks == 60 * 64  # the embedding, which is the head
    assert shape.largest == 64 * 128
    assert shape.hidden_size == 64
    assert shape.num_bytes == 4 * (shape.parameters + 5 * 64)


def test_more_work_takes_longer() -> None:
    plain = {method: _work(method).operations for method in ("rtn", "gptq", "awq", "dwq", "block")}
    assert all(plain["rtn"] < value for method, value in plain.items() if method != "rtn")
    assert _work("block", block_steps=100).operations > 2 * plain["block"]
    assert _work("block", scale_steps=10).operations > plain["block"]
    assert _work("gptq", rows=64).operations > plain["gptq"]
    assert _work("rtn", rotations=4).operations > plain["rtn"]
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert _work("gptq", budget=budget).operations > 4 * plain["gptq"]
    assert _work("block", scale_steps=10).held_bytes >= _work("block").held_bytes


def test_records_narrow_the_interval_around_what_was_measured() -> None:
    guess = predicted(10.0, [], slower=2.0)
    assert list(guess) == pytest.approx([20.0, 20 / 3, 60.0])
    once = predicted(10.0, [4.0], slower=2.0)
    often = predicted(10.0, [4.0, 4.1, 3.9, 4.0], slower=2.0)
    assert once.value == often.value == pytest.approx(40.0, rel=0.02)
    assert guess.high / guess.low > once.high / once.low > often.high / often.low
    unsteady = predicted(10.0, [1.0, 4.0, 16.0], slower=2.0)
    assert unsteady.low < 10.0 < 160.0 < unsteady.high


def test_the_line_says_where_the_figures_are_from() -> None:
    assert described("gptq", 40.0, 2e9, [], task="quantize:a") == (
        "quantize:a: gptq will take about 1 min 40 s (33 s to 5 min 0 s) and 2 GB (0.67 to 6), "
        "a guess: it never ran here"
    )
    records = [WorkRecord(1.0, 1.0)] * 2
    assert described("gptq", 40.0, 2e9, records, task="quantize:a") == (
        "quantize:a: gptq will take about 40 s (33 s to 48 s) and 2 GB (1.7 to 2.4), from 2 earlier runs here"
    )
    assert described("rtn", 0.01, 1e5, records, task="quantize") == (
        "quantize: rtn will take less than 1 s and less than 0.01 GB, from 2 earlier runs here"
    )


def test_runs_of_one_kind_predict_each_other() -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert kind_of(_request("rtn")) == "rtn"
    assert kind_of(_request("rtn", rotations=2, budget=budget)) == "rtn with rotations and a budget"
    assert kind_of(_request("block", scale_steps=3)) == "block with scales"


def test_held_memory_follows_one_block_and_not_their_number() -> None:
    few, many = (
        ModelShape.of(llama(vocab_size=60, hidden_size=64, num_layers=count, intermediate_size=128)[0], 60)
        for count in (2, 8)
    )
    for method in ("rtn", "gptq", "awq", "block"):
        held = [
            work_of(_request(method), shape, row_tokens=32, num_rows=64, validation_rows=8).held_bytes
            for shape in (few, many)
        ]
        assert held[1] == pytest.approx(held[0], rel=0.01), method


def test_the_trial_counts_products() -> None:
    assert 0 < operations_per_second(64, mx.float32) < np.inf


@pytest.mark.matrix
def test_a_run_is_announced_and_recorded_for_the_next_one(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    table = {"method": "gptq", "bits": 4, "calibration_rows": 8, "max_validation_rows": 8}
    job.run(**table)
    first = capfd.readouterr().err
    assert "quantize: gptq will take " in first
    assert "a guess: it never ran here" in first
    job.run(**table)
    assert "from 1 earlier run here" in capfd.readouterr().err
    (records,) = read_records(job.folder / "artifacts/.mlxflow/quantize-rates.json").values()
    assert len(records) == 2
