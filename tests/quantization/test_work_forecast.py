import re
import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.quantization_forecast import forecast_seconds
from mlxflow.quantization import block_calls, work_forecast
from mlxflow.quantization.bit_allocation import BudgetRequest
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.work_counts import work_of
from mlxflow.quantization.work_forecast import described, dtype_of_products, kind_of, operations_per_second, predicted
from mlxflow.quantization.work_records import WorkRecord, read_records
from tests.quantization.test_work_counts import request_of
from tests.small_models import llama
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


def test_the_benchmark_reads_the_seconds_of_a_forecast() -> None:
    assert forecast_seconds(described("gptq", 40.0, 2e9, [], task="quantize:a")) == (100, 33, 300)
    assert forecast_seconds(described("gptq", 4000.0, 2e9, [], task="q")) == (
        2 * 3600 + 46 * 60,
        55 * 60 + 33,
        8 * 3600 + 20 * 60,
    )
    assert forecast_seconds(described("rtn", 0.01, 1e5, [], task="quantize")) == (0, 0, 1)


def test_runs_of_one_kind_predict_each_other() -> None:
    budget = BudgetRequest(3.0, 0, (2, 4), (32, 64), setting="", key="")
    assert kind_of(request_of("rtn")) == "rtn"
    assert kind_of(request_of("rtn", rotations=2, budget=budget)) == "rtn with rotations and a budget"
    assert kind_of(request_of("block", scale_steps=3)) == "block with scales"
    assert kind_of(request_of("rtn", default=Setting("nvfp4", 4, 16))) == "rtn in nvfp4"
    assert kind_of(request_of("rtn", default=Setting("symmetric", 4, 64))) == "rtn"
    assert kind_of(request_of("qat", default=Setting("mxfp4", 4, 32), rotations=1)) == "qat in mxfp4 with rotations"


def test_the_trial_has_the_dtype_in_which_a_cpu_computes() -> None:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=1)
    model.set_dtype(mx.bfloat16)
    assert dtype_of_products(model) == (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)


def test_the_trial_counts_products() -> None:
    assert 0 < operations_per_second(64, mx.float32) < np.inf


def test_a_trial_lasts_longer_than_one_slow_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.04, *(0.04 + 0.001 * number for number in range(1, 100))])  # the first one waits for a CPU
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    products = 11  # one of 40 ms, then of 1 ms each until 50 ms are over
    assert operations_per_second(64, mx.float32) == pytest.approx(2.0 * products * 128 * 4 * 64 * 64 / 0.05)


_UNUSUAL = (
    "since llama cannot be computed block by block: it has blocks that are called more than once, or not at all; "
    "that takes about "
)
_SCALES = "the whole quantized model with gradients and averages of its scales, since it trains all layers at once"


@pytest.mark.parametrize(
    ("table", "is_unusual", "lines"),
    [
        (
            {"method": "gptq"},
            True,
            ["gptq holds the whole dense model and the Hessians of all its layers, " + _UNUSUAL],
        ),
        (
            {"target_bits_per_weight": 3.6, "candidate_bits": [2, 4], "candidate_group_sizes": [64]},
            True,
            ["the costs for a budget hold the whole dense model and gradients of all its weights, " + _UNUSUAL],
        ),
        ({"method": "dwq"}, False, [f"dwq holds {_SCALES}"]),
        pytest.param(
            {"method": "block", "block_steps": 0, "scale_steps": 1},
            False,
            [f"scale_steps hold {_SCALES}"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            {"method": "qat", "num_steps": 1, "training": "scales", "batch_size": 4},
            False,
            [f'training = "scales" holds {_SCALES}'],
            marks=pytest.mark.matrix,
        ),
        pytest.param({"method": "awq"}, True, [], marks=pytest.mark.matrix),
    ],
)
def test_a_part_that_holds_a_whole_model_says_so_before_the_start_and_the_forecast_counts_it(
    table: dict[str, Any],
    is_unusual: bool,
    lines: list[str],
    job: Job,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_unusual:
        monkeypatch.setattr(block_calls, "_problem", lambda *_: "blocks that are called more than once, or not at all")
    job.run(bits=4, calibration_rows=8, max_validation_rows=8, **table)
    output = capfd.readouterr().err.splitlines()
    found = [line for line in output if " whole " in line and " take " not in line]
    assert len(found) == len(lines)
    for line, begin in zip(found, lines, strict=True):
        assert line.startswith(f"quantize: {begin}")
        assert re.search(r"takes about [\d.]+ [kM]B$", line)
    if is_unusual and lines:
        assert any(" of a whole model will take " in line for line in output[: output.index(found[0])])


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


def test_a_run_that_exceeds_the_memory_limit_names_a_method_that_fits_before_the_start(
    job: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(request: Any, *sizes: Any, **named: Any) -> Any:
        work = work_of(request, *sizes, **named)
        return work._replace(held_bytes=1e16) if request.method == "gptq" else work

    monkeypatch.setattr(work_forecast, "work_of", counted)
    job.run(method="gptq", bits=4, calibration_rows=8, max_validation_rows=8)
    output = capfd.readouterr().err.splitlines()
    (line,) = [line for line in output if "memory limit" in line]
    assert line.startswith("quantize: about 10,000,000 GB is more than the memory limit of ")
    assert '. Set method = "block": it takes about ' in line
    job.run(bits=4, max_validation_rows=8)
    assert "memory limit" not in capfd.readouterr().err
