from pathlib import Path

from mlxflow.report.render import render
from mlxflow.report.stage_reports.report import SampleText
from tests.report.pages import Seen, text_of
from tests.report.runs import edit, read


def test_a_model_that_could_not_be_run_is_named_with_the_reason(root: Path) -> None:
    run = read(root, samples=[SampleText(model="train", model_key="", error="no room")])
    assert "train could not be asked: no room" in Seen(render([run])).text


def test_samples_of_an_earlier_model_are_left_out(root: Path) -> None:
    edit(root, "train", lambda report: report["stage"].update(inputs_digest="another"))
    text = text_of(root)
    assert "stage and on" not in text
    assert "1 samples of earlier models are left out. Run: mlxflow build report" in text
