"""doit as a user meets it."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import STAGES, doit, rest_in_matrix


def test_list_shows_each_stage_with_its_line_and_writes_nothing(job: Path) -> None:
    before = sorted(job.rglob("*"))
    result = doit(job, "list", "--all")
    assert result.returncode == 0, result.stderr
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.splitlines())
    assert set(STAGES) < shown.keys()
    assert shown["train"] == "Train a language model on the token files"
    assert sorted(job.rglob("*")) == before


def test_building_one_stage_builds_its_inputs_and_no_more(job: Path) -> None:
    result = doit(job, "quantize:q4")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0::2][:3] == [
        ".  pretokenize: never built",
        ".  train: never built",
        ".  quantize:q4: never built",
    ]
    done = (
        r"ok pretokenize: [\d.]+ s, [\d,]+ tokens to train on, [\d,]+ held out",
        r"ok train: [\d.]+ s, \d+ steps, held-out perplexity [\d.,]+ -> [\d.,]+",
        r"ok quantize:q4: [\d.]+ s, [\d.]+ kB, [\d.]+ bits per weight, held-out perplexity \S+ \(unquantized \S+\)",
    )
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(done, lines[1::2], strict=False))
    assert re.fullmatch(r"3 stages built in [\d.]+ s", lines[6])
    assert len(lines) == 7
    assert "\x1b" not in result.stdout + result.stderr
    assert sorted(p.name for p in (job / "artifacts").iterdir() if p.name[0] != ".") == [
        "logs",
        "pretokenize",
        "quantize",
        "train",
    ]
    assert ".  quantize:q8: never built" in doit(job, "quantize").stdout.splitlines()


def test_the_output_of_a_stage_is_kept_in_its_log(job: Path) -> None:
    result = doit(job, "train")
    assert "perplexity" in result.stderr
    assert "perplexity" in (job / "artifacts/logs/train.log").read_text()


def test_clean_removes_artifacts_and_their_records(job: Path) -> None:
    assert doit(job, "train").returncode == 0
    assert doit(job, "clean", "--clean-dep", "train").returncode == 0
    assert not (job / "artifacts/train").exists()
    assert not (job / "artifacts/pretokenize").exists()
    assert (job / "notes").exists()
    assert ".  pretokenize: never built" in doit(job, "pretokenize").stdout


def test_a_dry_clean_removes_nothing(job: Path) -> None:
    assert doit(job, "pretokenize").returncode == 0
    result = doit(job, "clean", "--dry-run", "pretokenize")
    assert "pretokenize - removing artifacts/pretokenize" in result.stdout
    assert doit(job, "pretokenize").stdout == "-- pretokenize\n"


def test_forget_makes_a_stage_stale(job: Path) -> None:
    assert doit(job, "pretokenize").returncode == 0
    assert doit(job, "forget", "pretokenize").returncode == 0
    assert doit(job, "pretokenize").stdout.startswith(".  pretokenize: forgotten by doit forget\nok pretokenize: ")
    assert doit(job, "pretokenize").stdout == "-- pretokenize\n"


def test_another_workflow_has_its_artifacts_beside_it(job: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = job / "other"
    other.mkdir()
    shutil.move(job / "notes", other / "notes")
    shutil.move(job / "workflow.toml", other / "workflow.toml")
    assert doit(job, "workflow=other/workflow.toml", "pretokenize").returncode == 0
    assert (other / "artifacts/pretokenize/train.safetensors").exists()
    assert not (job / "artifacts").exists()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(job / "dodo.py", elsewhere)
    result = doit(elsewhere, f"workflow={other / 'workflow.toml'}", "pretokenize")
    assert result.stdout == "-- pretokenize\n"


def test_an_invalid_workflow_is_one_line_and_exit_code_2(job: Path) -> None:
    (job / "workflow.toml").write_text("[train]\nnum_step = 3\n")
    for command in ([], ["list"], ["train"], ["clean"]):
        result = doit(job, *command)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "workflow.toml: train.num_step: unknown key. Did you mean train.num_steps?\n"
    assert not (job / "artifacts").exists()


def test_a_missing_workflow_is_an_error(job: Path) -> None:
    result = doit(job, "workflow=none.toml")
    assert result.returncode == 2
    assert result.stderr == "none.toml: missing. Write one (an empty file works), or name another.\n"


def test_an_unknown_stage_is_an_error_with_the_nearest_name(job: Path) -> None:
    result = doit(job, "trian")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "trian: no such stage. Did you mean train?\n")
    assert doit(job, "xyz").stderr == (
        "xyz: no such stage. "
        "Known: pretokenize, train, quantize, quantize:q4, quantize:q8, profile, benchmark, report.\n"
    )
    assert not (job / "artifacts").exists()


def test_a_stage_that_finds_a_user_error_ends_doit_with_2_and_one_line(job: Path) -> None:
    text = (job / "workflow.toml").read_text()
    (job / "workflow.toml").write_text(text.replace("batch_size = 4\neval_every", "batch_size = 4000\neval_every"))
    result = doit(job)
    assert result.returncode == 2
    assert result.stdout.splitlines()[-2] == "!! train: failed; its artifact is unchanged"
    assert result.stdout.splitlines()[-1].startswith("1 stage built in ")
    made, mistake = result.stderr.splitlines()
    assert made.startswith("pretokenize: 19 documents (")
    assert mistake.startswith("train.batch_size = 4000: the training text fills ")


def test_a_removed_source_is_reported_although_the_graph_is_cached(job: Path) -> None:
    assert doit(job, "pretokenize").returncode == 0
    assert doit(job, "pretokenize").stdout == "-- pretokenize\n"
    assert (job / "artifacts/.mlxflow/graph.json").exists()
    shutil.rmtree(job / "notes")
    result = doit(job, "pretokenize")
    assert result.returncode == 2
    assert result.stderr == (
        'workflow.toml: pretokenize.sources = "notes": names no file. '
        "Name a file, a folder or a glob with text in it.\n"
    )


@pytest.mark.parametrize("name", ["state.jsonl", "graph.json", "digests.json"])
@pytest.mark.parametrize("garbage", rest_in_matrix([b"", b"\xff\xfe", b"{}", b"[[[", b"null\n"], b"{}"))
def test_damaged_state_costs_at_most_a_rebuild(job: Path, name: str, garbage: bytes) -> None:
    assert doit(job, "pretokenize").returncode == 0
    (job / "artifacts/.mlxflow" / name).write_bytes(garbage)
    result = doit(job, "pretokenize")
    assert result.returncode == 0
    said = [line.partition(":")[0] for line in result.stderr.splitlines()]  # what is damaged may be said first
    assert [one for one in said if one != f"artifacts/.mlxflow/{name}"] in ([], ["pretokenize"])
    assert doit(job, "pretokenize").stdout == "-- pretokenize\n"


HEAVY = ("mlx", "mlx_lm", "numpy", "safetensors", "tokenizers", "transformers", "psutil", "rich", "msgspec")


def test_with_nothing_to_do_nothing_heavy_is_imported(job: Path) -> None:
    assert doit(job, "pretokenize").returncode == 0
    assert doit(job, "pretokenize").returncode == 0
    script = (
        "import sys, json\nfrom doit.doit_cmd import DoitMain\n"
        "code = DoitMain().run(['pretokenize'])\n"
        f"print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=job, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == [0, []]


def test_on_a_terminal_a_stage_draws_its_progress_bar(job: Path) -> None:
    assert doit(job, "pretokenize").returncode == 0
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "doit", "train"]
    with subprocess.Popen(command, cwd=job, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
        assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert "20/20" in text
    assert "tokens/s" in text
    assert "\x1b[" in text


def test_a_project_may_have_any_name(job: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    project = job.rename(outside / "-project [v2]\n*")
    shutil.copy(project / "dodo.py", outside)
    workflow = f"workflow={project.name}/workflow.toml"
    assert doit(outside, workflow, "pretokenize").stdout.startswith(".  pretokenize: never built\n")
    for command, said in (
        (["pretokenize"], "-- pretokenize"),
        (["plan", "pretokenize"], "nothing to do: 1 stages are fresh"),
        (["verify", "pretokenize"], "6 files of 1 stages read, 0 damaged"),
        (["pack", "pretokenize", "packed.tar"], "pretokenize: 6 files packed into packed.tar"),
        (["unpack", "packed.tar"], "pretokenize: 6 files unpacked into artifacts/pretokenize"),
    ):
        result = doit(outside, workflow, *command)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{said}\n", "")


def test_a_project_in_a_folder_whose_name_is_not_utf_8_is_refused_from_outside(
    job: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    try:
        project = job.rename(outside / os.fsdecode(b"b\xff"))
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    shutil.copy(project / "dodo.py", outside)
    result = doit(outside, f"workflow={project.name}/workflow.toml", "pretokenize")
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        "b\\xff/workflow.toml: its folder's name is not UTF-8, which MLX cannot open. Rename the folder, "
        "or call this from inside.\n",
    )
    assert not (project / "artifacts").exists()
    assert doit(project, "pretokenize").stdout.startswith(".  pretokenize: never built\n")
