"""The page of a real run, and `mlxflow report`."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mlxflow.__main__ import main
from mlxflow.cli.report import compare, report
from mlxflow.device import compute_device
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.loader import load_workflow
from tests.conftest import doit, mlxflow
from tests.report.pages import Seen


def _report(folder: Path) -> str:
    return Seen(report(load_workflow(folder / "workflow.toml")).read_bytes()).text


def _compare(*folders: Path) -> str:
    return Seen(compare(folders).read_bytes()).text


def test_the_report_stage_writes_its_page_beside_all_artifacts(built: Path) -> None:
    page = (built / "artifacts/index.html").read_bytes()
    assert page == (built / "artifacts/report/index.html").read_bytes()
    text = Seen(page).text
    assert "6 of 6 stages built" in text
    assert "benchmark built" in text


def test_samples_match_the_output_of_the_models(built: Path) -> None:
    from mlxflow.evaluation.text_generation import Sampling, generate
    from mlxflow.storage.run_context import derive_seed

    samples = read_report(built / "artifacts/report/report.toml")["samples"]
    assert [one["model"] for one in samples] == ["train", "quantize:q4", "quantize:q8"]  # one note is held out
    sampling = Sampling(48, 0.8, derive_seed(0, "report.samples"))
    one = samples[1]
    _, written = generate(built / "artifacts/quantize/q4", prompt=one["prompt"], sampling=sampling, raw=False)
    assert "".join(written) == one["prompt"] + one["text"]
    notes = "".join(path.read_text() for path in sorted((built / "notes").iterdir()))
    assert all(one["prompt"] in notes for one in samples)
    text = Seen((built / "artifacts/index.html").read_bytes()).text
    assert all(" ".join(one["text"].split()) in text for one in samples)


def test_mlxflow_report_writes_the_same_page_as_doit(job_copy: Path) -> None:
    before = (job_copy / "artifacts/index.html").read_bytes()
    (job_copy / "artifacts/index.html").unlink()
    result = mlxflow(job_copy, "report")
    assert (result.returncode, result.stdout, result.stderr) == (0, "artifacts/index.html\n", "")
    assert (job_copy / "artifacts/index.html").read_bytes() == before


def test_mlxflow_report_names_stale_and_missing_stages(job_copy: Path) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace("warmup_steps = 2", "warmup_steps = 3"))
    shutil.rmtree(job_copy / "artifacts/benchmark")
    text = _report(job_copy)
    assert "1 of 6 stages built" in text
    assert "train is out of date: its settings, its code or MLX changed." in text
    assert "quantize:q4 is out of date: train, which it reads from, is out of date or not built." in text
    assert "No benchmark to show: artifacts/benchmark/report.toml is missing. Run: mlxflow build benchmark" in text
    assert "Loss, in nats a token" in text


def test_mlxflow_report_judges_staleness_like_doit(job_copy: Path) -> None:
    """The page names the reason that `doit plan` prints; the report of the stage alone would not show it."""
    recorded = {
        "settings": load_workflow(job_copy / "workflow.toml").find("pretokenize").node().settings
        | compute_device.environment(None),
        "inputs": {},
        "outputs": {"artifacts/pretokenize/report.toml": [1, "0"]},
        "seconds": 1.0,
    }
    state = job_copy / "artifacts/.mlxflow"
    line = json.dumps({"task": "pretokenize", "record": {"_values_:": recorded, "deps:": []}})
    (state / "state.jsonl").write_text(line + "\n")
    planned = doit(job_copy, "plan", "pretokenize").stdout.splitlines()[0]
    reasons = planned.removeprefix("pretokenize: ").removesuffix("  (1.0 s last time)")
    assert reasons.startswith("artifacts/pretokenize/")
    assert f"pretokenize is out of date: {reasons}." in _report(job_copy)


def test_mlxflow_report_works_before_anything_is_built(job: Path) -> None:
    assert "0 of 6 stages built" in _report(job)


def test_mlxflow_report_shows_two_folders_side_by_side(built: Path, job_copy: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(built, tmp_path / "first"))
    before = (job_copy / "artifacts/index.html").read_bytes()
    (job_copy / "workflow.toml").write_text((built / "workflow.toml").read_text().replace('"tiny"', '"other"'))
    text = _compare(first, job_copy / "artifacts")
    assert "tiny and other" in text
    assert text.count("6 of 6 stages built") == 2
    assert (first / "artifacts/compare.html").exists()
    assert (job_copy / "artifacts/index.html").read_bytes() == before
    (job_copy / "workflow.toml").unlink()  # as of artifacts that were downloaded
    assert len(re.findall(r"(\d) of \1 stages built", _compare(first, job_copy))) == 2


def test_a_comparison_needs_two_folders_with_artifacts(
    job: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    (job / "artifacts").mkdir()
    assert main(["report", str(job), str(empty)]) == 2
    expected = f"report: {str(empty)!r}: holds no artifacts. Name a folder in which a stage was built.\n"
    assert capsys.readouterr().err == expected
    assert main(["report", str(job)]) == 2
    expected = f"report: {str(job)!r}: expected two or more runs. Use: mlxflow report . {job}\n"
    assert capsys.readouterr().err == expected
    assert not any((job / "artifacts").iterdir())


def test_open_shows_the_page_in_the_browser(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))  # type: ignore[func-returns-value]
    assert main(["report", "--open", "--workflow", str(job / "workflow.toml")]) == 0
    assert opened == [(job / "artifacts/index.html").resolve().as_uri()]


def test_watch_prints_an_address_and_ends_with_ctrl_c(job: Path) -> None:
    command = [sys.executable, "-m", "mlxflow", "report", "--watch"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=job, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with urllib.request.urlopen(url) as answer:  # noqa: S310
            assert "0 of 6 stages built" in Seen(answer.read()).text
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "The page follows the run. Ctrl-C ends it.\n")
    assert not (job / "artifacts/index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "port"),
    [(["--port", "8000"], 8000), (["--watch", "--port", "70000"], 70000), (["--watch", "--port", "-1"], -1)],
)
def test_an_invalid_port_is_refused(
    job: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], port: int
) -> None:
    assert main(["report", *arguments, "--workflow", str(job / "workflow.toml")]) == 2
    said = f"report: --port = {port}: expected 1 to 65535, with --watch. Add --watch or leave it out.\n"
    assert capsys.readouterr().err == said
