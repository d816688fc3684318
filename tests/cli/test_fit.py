import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.__main__ import main
from mlxflow.cli.fit import _cell, _unit_of
from mlxflow.storage.report_files import read_report
from mlxflow.training import forecast
from tests.conftest import mlxflow


def test_fit_refuses_other_stages_and_invalid_sizes(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job)
    assert main(["fit", "pretokenize"]) == 2
    assert main(["fit", "train"]) == 2
    assert main(["fit", "train", "--batch-sizes", "2"]) == 2
    assert main(["fit", "--batch-sizes", "0"]) == 2
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "pretokenize: expected a train or profile stage. Name one.",
        "artifacts/pretokenize/train.safetensors: missing. Run: mlxflow build pretokenize",
        "train: sizes are tried for a profile stage only. Leave them out.",
        "fit: 0: expected a number of at least 1. Use one such as 32.",
        "artifacts/train/config.json: missing. Run: mlxflow build profile",
    ]


def test_fit_computes_with_the_threads_of_the_workflow(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fixed = job / "workflow.toml", list[int]()
    path.write_text(re.sub(r"(?m)^\[workflow\]$", "[workflow]\nthreads = 1", path.read_text(), count=1))
    monkeypatch.chdir(job)
    monkeypatch.setattr("mlxflow.device.cpu_backend.fix_threads", lambda threads, key: fixed.append(threads))
    assert main(["fit", "train"]) == 2  # the tokens are not built
    assert fixed == [1]


def test_fit_prints_the_predicted_peak_of_each_shape(built: Path) -> None:
    result = mlxflow(built, "fit", "--batch-sizes", "2", "4")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2] == "| context_length | batch 2 | batch 4 | largest that fits |"
    assert [line.split()[1] for line in lines[4:7]] == ["8", "16", "32"]
    begin = r"peak of a training step in MB, predicted from \d+ measured points; limit [\d.]+ GB; ! exceeds it"
    assert re.fullmatch(begin, lines[0])
    end = r"checked at batch \d+, context \d+: [\d.]+ [MG]B measured, the prediction differs by [+-][\d.]+%"
    assert re.fullmatch(end, lines[-1])


@pytest.mark.parametrize(
    ("peaks", "name", "cells"),
    [
        ([[2e9, 0.1e9], [30e9, 4e9]], "GB", ["2.00", "0.10", "30.00 !", "4.00"]),
        ([[2e9, 0.09e9]], "MB", ["2,000.0", "90.0"]),
    ],
)
def test_all_peaks_of_a_table_have_one_unit_in_which_the_smallest_has_digits(
    peaks: list[list[float]], name: str, cells: list[str]
) -> None:
    unit = _unit_of(peaks)
    assert unit.name == name
    assert [_cell(peak, 20_000_000_000, unit) for row in peaks for peak in row] == cells


def test_fit_says_what_a_training_will_take_before_its_model_exists(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = read_report(built / "artifacts/train/report.toml")["run"]["training_peak_memory_bytes"]
    (tmp_path / "artifacts").mkdir()
    for name in ("workflow.toml", "notes", "artifacts/pretokenize"):
        (tmp_path / name).symlink_to(built / name)
    state = tmp_path / "artifacts/.mlxflow"
    state.mkdir()
    result = mlxflow(tmp_path, "fit", "train")
    assert result.returncode == 0, result.stderr
    found = re.fullmatch(
        r"train: fits: ([\d.]+) MB in a pass of [\d,]+ tokens; limit [\d.]+ GB\n"
        r"(\d+) steps: about ([\d,.]+) seconds to the end: ([\d.]+) to start, [\d.]+ to open the model, as often for "
        r"the written one, [\d.]+ to choose kernels and predict the memory, [\d.]+ more for the first step, "
        r"([\d.]+) a step, "
        r"[\d.]+ each of \d validations, [\d.]+ to write\n",
        result.stdout,
    )
    assert found, result.stdout
    predicted = float(found[1]) * 1e6
    assert float(found[3].replace(",", "")) >= float(found[4]) + int(found[2]) * float(found[5]) * 0.5
    assert 0.5 * trained < predicted < 2 * trained  # a tiny model: buffers of a step in flight are a large part
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == [".mlxflow", "pretokenize"]
    # the training that follows need not read its inputs for their digests
    assert "pretokenize/train.safetensors" in (state / "digests.json").read_text()


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        ("4 GB", "train: fits: 3.20 GB in a pass of 1,024 tokens; limit 4.00 GB"),
        (
            "3 GB",
            "train: fits: 3.20 GB in a pass of 1,024 tokens, 2.10 GB if the host waits for the device; limit 3.00 GB",
        ),
        ("2 GB", "train: does not fit: 3.20 GB in a pass of 1,024 tokens; limit 2.00 GB"),
    ],
)
def test_fit_says_whether_a_training_fits_if_the_host_waits(
    built: Path,
    tmp_path: Path,
    limit: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def known(*_: Any, **__: Any) -> forecast.Forecast:
        return forecast.Forecast(3.2e9, forecast.Seconds(1, 2, 3, 4, 5, 6, 7, 8), 1024, "", "Lower it.", 2.1e9)

    (tmp_path / "artifacts").mkdir()
    for name in ("notes", "artifacts/pretokenize"):
        (tmp_path / name).symlink_to(built / name)
    text = (built / "workflow.toml").read_text()
    changed = re.sub(r"(?m)^\[workflow\]$", f'[workflow]\nmemory_limit = "{limit}"', text, count=1)
    (tmp_path / "workflow.toml").write_text(changed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "forecast", known)
    before = mx.get_memory_limit()
    try:
        assert main(["fit", "train"]) == 0
    finally:
        mx.set_memory_limit(before)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == line
    assert (said[1] == "Lower it.") == (limit == "2 GB")
