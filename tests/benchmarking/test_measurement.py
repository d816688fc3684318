from pathlib import Path

import pytest

from mlxflow.benchmarking.measurement import BenchmarkRequest, if_it_fits, measure
from mlxflow.benchmarking.model_measurement import ComparedModels
from mlxflow.benchmarking.report_comparison import markdown_of_report
from mlxflow.benchmarking.time_budget import AskedAmounts
from mlxflow.report.stage_reports.benchmark import DeviceFacts
from tests.small_models import FREE


def test_models_are_measured_without_a_training_and_without_tokens(built: Path) -> None:
    folders = {"base": built / "artifacts/train", "quantize:q4": built / "artifacts/quantize/q4"}
    weights = {name: folder / "model.safetensors" for name, folder in folders.items()}
    models = ComparedModels(weights, weights["base"], None, (4,), 8, 1, key="benchmark.models")
    device = DeviceFacts(kind="cpu", name="this", processor="one")
    report = measure(BenchmarkRequest(6, device, AskedAmounts(5, 5, 8, 0), "", ""), None, models, FREE)
    base, q4 = report.models
    assert (base.perplexity, base.asked_bits_per_weight, report.training, report.convergence) == (None, None, (), None)
    assert base.measured is not None
    assert base.measured.decode_speed.low > 0
    assert q4.compression_ratio is not None
    assert q4.compression_ratio > 1
    assert [*report.promises] == ["model_size"]
    assert "perplexity" not in str(report.promises["model_size"].figure)
    first, _, *rows = markdown_of_report(report).splitlines()
    assert first.startswith("| model |")
    assert [row.rpartition("| ")[2] for row in rows] == ["- |", "- |"]


def test_parts_out_of_memory_are_left_out_and_other_failures_are_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(said: str) -> None:
        raise RuntimeError(said)

    assert if_it_fits(lambda: 3) == 3
    assert if_it_fits(lambda: fail("[malloc] Unable to allocate 5 bytes.")) is None
    assert capsys.readouterr().err == (
        "benchmark: left out, it does not fit into the memory ([malloc] Unable to allocate 5 bytes.)\n"
    )
    with pytest.raises(RuntimeError, match="a mistake"):
        if_it_fits(lambda: fail("a mistake"))
