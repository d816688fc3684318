"""The report stage: which artifacts it reads, and the page that it draws of a real run."""

from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.report.stage_reports.report import PageReport
from mlxflow.storage import report_structs
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Stage
from tests.report.pages import Seen

STAGES = """
[[pretokenize]]
name = "a"
[[pretokenize]]
name = "b"
[train]
input = "pretokenize:b"
num_steps = 1
[[quantize]]
name = "q4"
data = "pretokenize:b"
[profile]
data = "pretokenize:b"
[report]
"""


def _report(folder: Path, keys: str = "") -> Stage:
    path = folder / "workflow.toml"
    path.write_text(STAGES + keys)
    return load_workflow(path).find("report")


def test_the_page_and_its_samples_come_from_the_reports(built: Path) -> None:
    folder = built / "artifacts/report"
    page = (folder / "index.html").read_bytes()
    report = report_structs.read(folder / "report.toml", PageReport, advice="").figures
    assert report.page_bytes == len(page)
    text = Seen(page).text
    assert {sample.model for sample in report.samples} == {"train", "quantize:q4", "quantize:q8"}
    for sample in report.samples:
        assert sample.text is not None
        assert " ".join(sample.text.split()) in text
    assert (built / "artifacts/index.html").read_bytes() == page


def test_every_stage_before_is_read_and_samples_take_the_first_tokens(tmp_path: Path) -> None:
    inputs: Any = _report(tmp_path).inputs
    assert set(inputs.reports) == {"pretokenize:a", "pretokenize:b", "train", "quantize:q4", "profile"}
    assert inputs.curves == {"train": Path("artifacts/train/metrics.jsonl")}
    assert inputs.timelines == {"profile": Path("artifacts/profile/timeline.safetensors")}
    assert list(inputs.models) == ["train", "quantize:q4"]
    assert {path.parent.as_posix() for path in inputs.validation} == {"artifacts/pretokenize/a"}


@pytest.mark.parametrize("keys", ['prompts = ["Once"]', "models = []"])
def test_prompts_or_no_models_need_no_held_out_documents(tmp_path: Path, keys: str) -> None:
    inputs: Any = _report(tmp_path, keys).inputs
    assert inputs.validation == ()
    assert bool(inputs.models) == ("prompts" in keys)


def test_more_samples_than_can_be_written_are_refused(tmp_path: Path) -> None:
    variants = "".join(f'[[quantize]]\nname = "v{number}"\ndata = "pretokenize:b"\n' for number in range(48))
    with pytest.raises(WorkflowError) as caught:
        _report(tmp_path, f"num_prompts = 20\nprompt_tokens = 1_048_576\n{variants}")
    assert str(caught.value).partition("workflow.toml: ")[2] == (
        "report.prompt_tokens = 1048576: expected, with 20 prompts of 50 models, at most 1,000,000,000 tokens read and "
        "written, not 1,048,624,000. Lower it, or name fewer prompts or models."
    )
