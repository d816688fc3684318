import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization import block_calls
from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.work_forecast import described, kind_of, operations_per_second, predicted
from mlxflow.quantization.work_records import WorkRecord, read_records
from tests.quantization.test_work_counts import request_of
from tests.stages.test_quantize import Job
from tests.stages.test_quantize import job as job  # a fixture


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
    assert kind_of(request_of("rtn")) == "rtn"
    assert kind_of(request_of("rtn", rotations=2, budget=budget)) == "rtn with rotations and a budget"
    assert kind_of(request_of("block", scale_steps=3)) == "block with scales"


def test_the_trial_counts_products() -> None:
    assert 0 < operations_per_second(64, mx.float32) < np.inf


def test_gptq_says_why_it_holds_a_whole_model_and_the_forecast_counts_it(
    job: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_calls, "_problem", lambda *_: "blocks that are called more than once, or not at all")
    job.run(method="gptq", bits=4, calibration_rows=8, max_validation_rows=8)
    lines = [line for line in capfd.readouterr().err.splitlines() if "whole" in line]
    assert lines[0].startswith("quantize: gptq of a whole model will take ")
    assert lines[1].startswith(
        "quantize: gptq holds the whole dense model and the Hessians of all its layers, since llama cannot be learned "
        "block by block: it has blocks that are called more than once, or not at all; that takes 0.0"
    )


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
