"""TensorBoard's event files, read back by TensorBoard's own reader."""

from pathlib import Path
from typing import Any

import pytest

from mlxflow.tracking import request as requests
from mlxflow.tracking import tensorboard_run
from mlxflow.tracking.tracked_run import points_of
from tests.tracking.runs import SETTINGS, lines, losses, report, request_of, run_in

pytest.importorskip("tensorboardX")
pytest.importorskip("tensorboard")


def _read(folder: Path) -> Any:
    """Return the events of a run in TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return _rounded(_read(folder), name)


def _rounded(events: Any, name: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric; TensorBoard's values are fp32."""
    return [(one.step, round(one.value, 4)) for one in events.Scalars(name)]


def test_a_run_has_each_point_once_with_its_settings_and_final_figures(tmp_path: Path) -> None:
    run = run_in(tmp_path, [10, 20, 30])
    outcomes, said = report(request_of(run, "tensorboard"))
    assert said == []
    assert [(one.problem, one.points) for one in outcomes] == [("", 12)]
    folder = tmp_path / "tracking" / "tensorboard" / "train-0123456789ab"
    assert _scalars(folder, "train/loss") == losses([10, 20, 30])
    assert [one.wall_time for one in _read(folder).Scalars("train/loss")] == [
        1_700_000_005,
        1_700_000_010,
        1_700_000_015,
    ]
    assert _scalars(folder, "final/models.quantize_q4.perplexity") == [(30, 5.5)]
    text = _read(folder).Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| learning_rate | 0.01 |" in text
    assert '| sources | ["a\\|b"] |' in text


def test_settings_are_hyperparameters_of_the_run(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    report(request_of(run_in(tmp_path, [10]), "tensorboard"))
    events = _read(tmp_path / "tracking" / "tensorboard" / "train-0123456789ab")
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert set(started.hparams) == set(SETTINGS)
    assert started.hparams["model.hidden_size"].number_value == 64


@pytest.mark.matrix
def test_a_run_that_goes_on_and_is_reported_twice_has_each_point_once(tmp_path: Path) -> None:
    run = run_in(tmp_path, [10, 20])
    report(request_of(run, "tensorboard"), requests.INTERRUPTED)
    folder = tmp_path / "tracking" / "tensorboard" / "train-0123456789ab"
    reader = _read(folder)  # as of a TensorBoard that is open
    (tmp_path / "metrics.jsonl").write_text(lines([10, 20, 30]))
    for _ in range(2):
        outcomes, _ = report(request_of(run, "tensorboard"))
    assert outcomes[0].points == 0
    assert len(list(folder.iterdir())) == 2  # the last report had nothing to add
    for one in (reader.Reload(), _read(folder)):
        assert _rounded(one, "train/loss") == losses([10, 20, 30])
        assert len(one.Scalars("final/run.seconds")) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_file_that_was_cut_off_has_what_is_whole_and_the_rest_is_reported(tmp_path: Path, share: float) -> None:
    run = run_in(tmp_path, [])
    points = [one for line in lines(range(0, 400, 10)).encode().split(b"\n") for one in points_of(line)]
    first = tensorboard_run.TensorBoardRun(run)
    first.log(points)
    first.finish(None)
    (path,) = (tmp_path / "tracking" / "tensorboard" / "train-0123456789ab").iterdir()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    second = tensorboard_run.TensorBoardRun(run)
    assert second.known.get("train/loss", -1) < 390
    second.log([one for one in points if one.step > second.known.get(one.name, -1)])
    second.finish(None)
    assert _scalars(path.parent, "train/loss") == losses(range(0, 400, 10))
