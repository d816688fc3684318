import fcntl
import shutil
from pathlib import Path

import pytest

from tests.report.pages import text_of
from tests.report.runs import TASKS, edit, read


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_report_is_named_and_the_rest_is_shown(root: Path, task: str) -> None:
    (root / "artifacts" / Path(*task.split(":")) / "report.toml").unlink()
    text = text_of(root)
    assert f"{task} is not built" in text
    assert f"artifacts/{task.replace(':', '/')}/report.toml is missing. Run: mlxflow build {task}" in text
    assert "5 of 6 stages built" in text


def test_a_failed_stage_has_the_last_line_of_its_log(root: Path) -> None:
    (root / "artifacts/quantize/q4/report.toml").unlink()
    (root / "artifacts/logs").mkdir()
    (root / "artifacts/logs/quantize-q4.log").write_text("begun\nquantize:q4: perplexity is 12 % above the limit\n\n")
    assert "Its last run ended with: quantize:q4: perplexity is 12 % above the limit" in text_of(root)


def test_a_damaged_report_is_named_and_the_others_are_shown(root: Path) -> None:
    (root / "artifacts/train/report.toml").write_text("steps = ")
    text = text_of(root)
    assert "artifacts/train/report.toml is damaged" in text
    assert "train is damaged" in text
    assert "Peak memory by phase" in text


def test_a_report_of_another_version_is_shown_and_called_out_of_date(root: Path) -> None:
    edit(root, "profile", lambda report: report["stage"].update(mlxflow="0.0.1"))
    text = text_of(root)
    assert "profile is out of date" in text
    assert "artifacts/profile/report.toml was written by mlxflow 0.0.1." in text
    assert "Peak memory by phase" in text


def _begin(root: Path) -> None:
    """Write what a training leaves while it goes on."""
    (root / "artifacts/.train.partial").mkdir()
    line = '{"kind": "train", "step": 7, "loss": 3.25}\n'
    (root / "artifacts/.train.partial/metrics.jsonl").write_text(line)
    (root / "artifacts/.mlxflow").mkdir()


def test_a_stage_that_is_built_again_is_running_and_shows_its_new_curve(root: Path) -> None:
    _begin(root)
    with (root / "artifacts/.mlxflow/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = read(root)
        assert run.of_kind("train")[0].state == "running"
        assert [one["step"] for one in run.curves["train"].records] == [7]
        text = text_of(root)
    assert "train is running; the page shows it so far." in text
    assert "How is train doing? 3.250 nats a token while training, at step 7." in text
    assert "5 of 6 stages built" in text
    assert read(root).of_kind("train")[0].state == "fresh"  # a killed run's folder, beside the earlier artifact


def test_the_curve_of_a_killed_run_is_shown_where_there_is_no_artifact(root: Path) -> None:
    _begin(root)
    shutil.rmtree(root / "artifacts/train")
    run = read(root)
    assert run.of_kind("train")[0].state == "missing"
    assert [one["step"] for one in run.curves["train"].records] == [7]
