"""What a benchmark stage reports, and what it refuses before it measures."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.stages import benchmark
from mlxflow.storage import report_files
from mlxflow.storage.run_context import Context


@pytest.fixture
def report(built: Path) -> dict[str, Any]:
    return report_files.read_report(built / "artifacts/benchmark/report.toml")


def _context(folder: Path) -> Context:
    return msgspec.convert(
        {
            "task": "benchmark",
            "seed": 0,
            "device": "cpu",
            "memory_limit_bytes": 1,
            "provenance": {},
            "tasks": [],
            "members": [],
            "name": "tiny",
            "digests": str(folder / "digests.json"),
            **{name: str(folder) for name in ("root", "state", "folder", "unfinished")},
        },
        Context,
        dec_hook=lambda kind, value: kind(value),
    )


def test_a_baseline_of_another_version_is_refused_before_anything_is_measured(
    report: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "before.toml"
    report_files.write_report(path, report | {"version": 1})
    inputs = benchmark.Inputs(baseline=(path,))
    with pytest.raises(ArtifactError, match=f"version = 1: expected {benchmark.VERSION}"):
        benchmark.run(
            config=benchmark.Config(baseline="before.toml"),
            inputs=inputs,
            outputs=benchmark.Outputs(),
            context=_context(tmp_path),
        )


def test_every_optimization_of_the_workflow_is_switched_off_at_its_own_batch_size(report: dict[str, Any]) -> None:
    rows = [(row["name"], row["batch_size"]) for row in report["training"]]
    assert rows[:4] == [("baseline", 2), ("workflow", 2), ("baseline", 4), ("workflow", 4)]
    assert {name for name, _ in rows[4:]} >= {"without compile", "without run-ahead", "without fused_loss"}
    assert {size for _, size in rows[4:]} == {4}
    for row in report["training"]:
        assert ("workflow_speedup" in row) == (row["name"] != "workflow")
        assert row["low_tokens_per_second"] <= row["tokens_per_second"] <= row["high_tokens_per_second"]
        assert row["peak_memory_bytes"] > 0 <= row["compile_seconds"]


def test_curves_bottleneck_device_and_speeds_are_reported(report: dict[str, Any]) -> None:
    assert [curve["name"] for curve in report["convergence"]] == ["baseline", "workflow"]
    assert all(curve["steps"] == [1, 2, 3, 4] for curve in report["convergence"])
    shares = [report["bottleneck"][f"{part}_share"] for part in ("data", "graph", "compute", "synchronize")]
    assert sum(shares) == pytest.approx(1)
    for reached in ("flops_per_second", "decode_bytes_per_second"):
        assert report["bottleneck"][reached] > 0
        assert report["bottleneck"][f"ceiling_{reached.removeprefix('decode_')}"] > 0
    assert report["bottleneck"]["advice"]
    assert report["drift"]["name"] == "baseline"
    for row in report["models"]:
        assert [one["prompt_tokens"] for one in row["prefill"]] == [4, 8, 16]
        assert row["compression_ratio_fp32"] == pytest.approx(2 * row["compression_ratio_bf16"])
        assert row["peak_memory_bytes"] > 0.9 * row["model_bytes"]
        assert row["decode_tokens_per_second"] > 0
