import json
import os
from pathlib import Path

from mlxflow.report.render import render
from tests.report.pages import Seen, text_of
from tests.report.runs import read


def test_a_cut_off_timeline_is_shown_up_to_the_cut(root: Path) -> None:
    path = root / "artifacts/profile/timeline.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    page = render([read(root)]).decode()
    assert "profile/timeline.safetensors is damaged or was cut off in" in page
    assert "MLX&#39;s memory, at each step&#39;s end" in page
    path.write_bytes(b"\xff" * 40)
    page = render([read(root)]).decode()
    assert "profile/timeline.safetensors is damaged: its header cannot be read. Run: mlxflow build profile" in page


def _leave_a_journal(root: Path, *, end: bool = False) -> Path:
    left = root / "artifacts/.mlxflow/unfinished/profile/0123456789ab/timeline.jsonl"
    left.parent.mkdir(parents=True)
    told: list[list[object]] = [["columns", "seconds", "active_memory_bytes"], ["enter", "load_model", 0.0]]
    told += [["phase", "load_model", 0.0, 0.5, 5e8], ["sample", 0.6, 1e8], ["step", 1, 0.7, 3e8], ["step", 2, 0.9, 2e8]]
    told += [["enter", "training_step", 0.9], ["enter", "training_step/update", 1.0]]
    told += [["end"]] if end else []
    left.write_text("".join(f"{json.dumps(line)}\n" for line in told) + '["sample", 1.1, 2')
    return left


def test_the_journal_of_a_killed_profile_is_shown_beside_the_artifact(root: Path) -> None:
    _leave_a_journal(root)
    page = Seen(render([read(root)]))
    said = "The last run of profile was cut off in training_step/update after step 2; all that it measured until then"
    assert said in page.text
    labels = " ".join(value or "" for key, value in page.attributes if key == "aria-label")
    assert "MLX's memory, at each step's end until then. active: 300 MB at most." in labels
    assert "active: 100 MB at most. Phases: load_model, training_step, training_step/update." in labels
    assert "9 MB in MLX's arrays at the peak of a training step" in page.text  # the artifact is as it was
    assert page.text.count("MLX's memory, sampled until then") == 1


def test_a_failed_profile_is_not_called_cut_off_and_a_newer_artifact_replaces_it(root: Path) -> None:
    left = _leave_a_journal(root, end=True)
    assert "The last run of profile failed or was stopped in training_step/update after step 2" in text_of(root)
    report = root / "artifacts/profile/report.toml"
    os.utime(report, ns=(0, left.stat().st_mtime_ns + 1))
    assert "The last run of profile" not in text_of(root)
    report.unlink()
    assert "500 MB at most until the profile ended: it failed" in text_of(root)


def test_the_readable_part_of_a_journal_is_shown(root: Path) -> None:
    left = _leave_a_journal(root)
    left.write_bytes(
        b'\xff\n[]\n3\n["step"]\n["phase",1]\n["enter"]\n["columns"]\n{"a":1}\n["step",null]\n["enter",2,"x"]'
    )
    text = text_of(root)
    assert "The last run of profile was cut off before the first step's end" in text
    assert "profile left a timeline that holds no readings." in text
