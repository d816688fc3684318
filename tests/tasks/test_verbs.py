"""Every verb of doit on stages: no traceback, one line for a mistake in the call, quiet when nobody reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doit.doit_cmd import DoitMain

from mlxflow.storage import state_files
from mlxflow.storage.report_files import write_report
from tests.chain import Chain


@pytest.fixture(scope="module")
def looked_at(template: Path) -> Chain:
    """A chain that is built; tests only look at it."""
    return Chain(template)


_UNKNOWN = "s9: no such stage. Known: s1, s2, s3, s4, s5, s6.\n"
_JOURNAL = "not supported for stages, which have their own journal. Leave it out.\n"
_RESET = "reset-dep: not supported: the freshness of a stage follows from the record of its last run. "
_RESET += "Use: doit plan\n"
_STRACE = "strace: doit cannot trace the processes of stages. What one reads and writes: doit info STAGE\n"
_OPTION = "Error parsing Command: option --nosuch not recognized. See: doit help"

WRONG_CALLS = {
    "nosuch": "nosuch: no such stage. Known: s1, s2, s3, s4, s5, s6.\n",
    "s9 s1": _UNKNOWN,
    "list s9": _UNKNOWN,
    "info s9": _UNKNOWN,
    "clean s9": _UNKNOWN,
    "forget s9": _UNKNOWN,
    "ignore s9": _UNKNOWN,
    "ignore --undo s9": _UNKNOWN,
    "dumpdb s9": _UNKNOWN,
    "verify s9": _UNKNOWN,
    "plan s9": _UNKNOWN,
    "plan sn3": "sn3: no such stage. Did you mean s3?\n",
    "help sn3": "sn3: no such stage or command. Did you mean s3?\n",
    "info": "expected one stage. Use: doit info STAGE\n",
    "info s1 s2": "expected one stage. Use: doit info STAGE\n",
    "ignore": "expected a stage. Use: doit ignore STAGE\n",
    "clean --leftovers s1": "--leftovers: removes the artifacts of removed stages and takes no stage names. "
    "Leave them out.\n",
    "reset-dep": _RESET,
    "reset-dep s1": _RESET,
    "strace s1": _STRACE,
    "list --template {foo}": "--template '{foo}': cannot be filled in ('foo'). Known: {name}, {doc}.\n",
    "list --template {": "--template '{': cannot be filled in (expected '}' before end of string). "
    "Known: {name}, {doc}.\n",
    "list --sort x": "Error parsing parameter 'sort'. Provided 'x' but available choices are: 'name', 'definition'. "
    "See: doit help list\n",
    "--nosuch": f"{_OPTION} run\n",
    "plan --nosuch": f"{_OPTION} plan\n",
    "dumpdb --nosuch": f"{_OPTION} dumpdb\n",
    "--backend json": f"--backend: {_JOURNAL}",
    "list --backend dbm": f"--backend: {_JOURNAL}",
    "forget --db-file x": f"--db-file: {_JOURNAL}",
    "run --check_file_uptodate md5": f"--check_file_uptodate: {_JOURNAL}",
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_an_invalid_command_line_is_one_error_line_and_changes_nothing(looked_at: Chain, call: str) -> None:
    before = _contents(looked_at.folder)
    assert looked_at.doit(*call.split()) == (2, "", WRONG_CALLS[call])
    assert _contents(looked_at.folder) == before


def _contents(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file but Python's bytecode of dodo.py."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path: path.read_bytes() for path in files}


LOOKS = ["list", "list --status", "plan", "info s1", "dumpdb", "help", "help s1", "help list", "verify", "cache-key s1"]
LOOKS += [
    "tabcompletion",
    "tabcompletion --shell zsh",
    "tabcompletion --hardcode-tasks",
    "clean -n",
    "ignore --undo s1",
]


def test_every_verb_is_covered_by_this_file() -> None:
    tried = {call.split()[0] for call in (*LOOKS, *WRONG_CALLS)} | {
        "run",
        "pack",
        "unpack",
        "reproduce",
        "push",
        "pull",
    }
    assert set(DoitMain().get_cmds()) <= tried


@pytest.mark.parametrize("call", [*LOOKS, "", "-a s1"])
def test_a_verb_ends_quietly_when_its_output_pipe_is_closed(looked_at: Chain, call: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "doit", *call.split()]
    result = subprocess.run(
        command, cwd=looked_at.folder, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    os.close(writing)
    assert (result.returncode, result.stderr.replace("at work on s1\n", "")) == (141, "")


def test_a_run_with_a_closed_output_pipe_leaves_no_half_built_stage(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another")
    command = f"{sys.executable} -m doit 2>&1 | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, shell=True, cwd=chain.folder, capture_output=True, text=True, env=environment)  # noqa: S602
    assert (result.stdout, result.stderr) == (".  s1: source source changed\n", "")
    assert chain.doit()[0] == 0
    chain.assert_correct()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_journal_is_intact_after_a_run_with_closed_streams(chain: Chain, closed: str) -> None:
    (chain.folder / "source").write_bytes(b"another")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = f"{sys.executable} -m doit {closed}"
    assert subprocess.run(command, shell=True, cwd=chain.folder, check=False, env=environment).returncode == 0  # noqa: S602
    assert chain.doit("plan")[1] == "nothing to do: 6 stages are fresh\n"
    chain.assert_correct()
    journal = (chain.folder / "artifacts/.mlxflow/state.jsonl").read_text()
    assert all(json.loads(line)["task"] for line in journal.splitlines())


def test_list_status_of_a_group_summarizes_its_variants(job: Path) -> None:
    from tests.conftest import doit

    lines = doit(job, "list", "--status", "quantize").stdout.splitlines()
    assert [line[:10] for line in lines] == ["R quantize"]
    assert doit(job, "ignore", "quantize").stdout == (
        "quantize:q4: ignored until doit ignore --undo quantize:q4\n"
        "quantize:q8: ignored until doit ignore --undo quantize:q8\n"
    )
    lines = doit(job, "list", "--status", "quantize").stdout.splitlines()
    assert [line[:10] for line in lines] == ["I quantize"]


def test_info_says_what_a_stage_reads_and_writes_and_why_it_is_stale(chain: Chain) -> None:
    code, out, err = chain.doit("info", "s2")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[:4] == ["s2", "    stage 2", "", "status: fresh"]
    assert lines[4].startswith("last run: ")
    assert lines[5:] == ["inputs:", "  - artifacts/s1/a", "outputs:", "  - artifacts/s2/a"]
    chain.path(2).unlink()
    code, out, _ = chain.doit("info", "s2")
    assert (code, out.splitlines()[3:5]) == (1, ["status: stale", "  - artifacts/s2/a is missing"])
    assert "status" not in chain.doit("info", "--no-status", "s2")[1]


def test_an_ignored_stage_and_its_readers_do_not_run_until_the_ignore_is_undone(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another")
    assert chain.doit("ignore", "s3") == (0, "s3: ignored until doit ignore --undo s3\n", "")
    plan = chain.doit("plan")[1].splitlines()
    assert [line.partition("  (")[0] for line in plan[:2]] == ["s1: source source changed", "s2: because s1 runs"]
    assert plan[3] == "s3: ignored, and so are those that read from it, until doit ignore --undo s3"
    code, out, _ = chain.doit()
    assert (code, out.splitlines()) == (
        0,
        [
            ".  s1: source source changed",
            ".  s2: artifacts/s1/a changed",
            "-- s3: ignored, until doit ignore --undo s3",
            *(f"-- s{i}: ignored, as is a stage that it reads from" for i in (4, 5, 6)),
        ],
    )
    assert chain.doit("ignore", "--undo", "s3") == (0, "s3: no longer ignored\n", "")
    assert chain.numbers_that_run() == [3, 4, 5, 6]
    chain.assert_correct()


def test_undoing_the_ignore_of_a_fresh_stage_leaves_it_fresh(chain: Chain) -> None:
    assert chain.doit("ignore", "s3")[0] == 0
    assert chain.doit("ignore", "--undo", "s3")[0] == 0
    assert chain.numbers_that_run() == []


def test_dumpdb_prints_the_journal_as_json(looked_at: Chain) -> None:
    code, out, err = looked_at.doit("dumpdb")
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == [f"s{i}" for i in range(1, 7)]
    assert json.loads(looked_at.doit("dumpdb", "s2")[1])["s2"]["_values_:"]["outputs"].keys() == {"artifacts/s2/a"}


def test_verbs_that_write_wait_for_a_running_doit(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another")
    process, _ = chain.pause_in(2)
    waiting = chain.start("clean", "s1")
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    (chain.folder / "go").write_text("x")
    process.communicate()
    out, _ = waiting.communicate()
    assert line.startswith("another doit (process ")
    assert (process.returncode, waiting.returncode, out) == (
        0,
        0,
        "s1 - removing artifacts/s1\nfreed 1,000 bytes and 1 digests of removed files\n",
    )


def test_a_verb_on_stages_refuses_a_graph_without_any(tmp_path: Path) -> None:
    (tmp_path / "dodo.py").write_text("def task_x():\n    return {'actions': ['true']}\n")
    command = [sys.executable, "-m", "doit", "plan"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        "plan: needs the stages of a workflow.toml; this dodo.py has none.\n",
    )


@pytest.mark.parametrize(
    ("call", "code", "out"),
    [
        ("list", 0, "x   \n"),
        ("x", 0, ".  x\n"),
        ("ignore x", 0, "ignoring x\n"),
        ("forget x", 0, "forgetting x\n"),
        ("clean", 0, ""),
        ("reset-dep x", 0, "processed x\n"),
        ("list nosuch", 3, ""),
        ("help x", 0, "x  \n"),
    ],
)
def test_in_other_projects_the_verbs_of_doit_are_unchanged(tmp_path: Path, call: str, code: int, out: str) -> None:
    (tmp_path / "dodo.py").write_text("def task_x():\n    return {'actions': ['true']}\n")
    command = [sys.executable, "-m", "doit", *call.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (code, out)


@pytest.mark.parametrize("own_tasks", [False, True])
def test_a_dodo_file_that_imports_top_level_tasks_is_refused_in_one_line(tmp_path: Path, own_tasks: bool) -> None:
    (tmp_path / "dodo.py").write_text("from tasks.dodo import DOIT_CONFIG, task_stages\n")
    if own_tasks:
        (tmp_path / "tasks.py").touch()
    command = [sys.executable, "-m", "doit", "list"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        "dodo.py: from tasks.dodo import: expected mlxflow.tasks.dodo. "
        "Write: from mlxflow.tasks.dodo import DOIT_CONFIG, task_stages\n",
    )


# --- what stages that are no more left


def _leave(folder: Path, task: str, size: int) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    write_report(
        folder / "report.toml",
        {"stage": {"stage": task}, "run": {"files": ["model.safetensors", "report.toml"]}},
    )


def test_artifacts_of_removed_stages_are_named_and_removed_only_on_request(chain: Chain) -> None:
    artifacts = chain.folder / "artifacts"
    _leave(artifacts / "train/a", "train:a", 10_000)
    _leave(artifacts / "my-backup", "train", 10)  # a copy under another name is a person's
    (artifacts / "train/a/notes.txt").write_text("mine")
    report = (artifacts / "train/a/report.toml").stat().st_size
    line = (
        f"artifacts/train/a: belongs to no stage (2 files, {10_000 + report:,} bytes). "
        "Remove it with: doit clean --leftovers\n"
    )
    freed = "freed 1,000 bytes and 1 digests of removed files\n"
    assert chain.doit("plan") == (0, f"nothing to do: 6 stages are fresh\n{line}", "")
    assert chain.doit("clean", "s6") == (0, f"s6 - removing artifacts/s6\n{line}{freed}", "")
    assert chain.doit("clean", "--leftovers", "-n") == (0, "removing artifacts/train/a\n", "")
    assert (artifacts / "train/a/model.safetensors").exists()
    freed = f"freed {10_000 + report:,} bytes\n"
    assert chain.doit("clean", "--leftovers") == (0, f"removing artifacts/train/a\n{freed}", "")
    assert [path.name for path in (artifacts / "train").rglob("*")] == ["a", "notes.txt"]
    assert (artifacts / "my-backup/model.safetensors").exists()
    assert chain.path(5).exists()
    assert chain.doit("clean", "--leftovers") == (0, "", "")


def test_clean_keeps_and_names_files_that_no_run_wrote(chain: Chain) -> None:
    (chain.folder / "artifacts/s1/notes.txt").write_text("mine")
    assert chain.doit("clean", "s1") == (
        0,
        "s1 - removing artifacts/s1\nartifacts/s1/notes.txt: left alone, s1 did not write it\nfreed 1,000 bytes\n",
        "",
    )
    assert [path.name for path in (chain.folder / "artifacts/s1").iterdir()] == ["notes.txt"]


def test_clean_removes_unfinished_runs_and_reports_the_freed_bytes(chain: Chain) -> None:
    state = chain.folder / "artifacts/.mlxflow"
    for name, size in (("s2/0123456789ab", 300), ("s2/123456789abc", 33), ("s9/a/0123456789ab", 77)):
        (state / "unfinished" / name).mkdir(parents=True)
        (state / "unfinished" / name / "state.json").write_bytes(b"x" * size)
    left = "artifacts/.mlxflow/unfinished/s9/a/0123456789ab"
    removing = "s2 - removing artifacts/s2\ns2 - removing files of 2 unfinished runs (333 bytes)\n"
    named = f"{left}: belongs to no stage (77 bytes). Remove it with: doit clean --leftovers\n"
    assert chain.doit("clean", "-n", "s2") == (0, removing + named, "")
    assert chain.doit("clean", "s2") == (0, f"{removing}{named}freed 1,333 bytes\n", "")
    assert list((state / "unfinished/s2").iterdir()) == []
    assert chain.doit("clean", "--leftovers") == (0, f"removing {left}\nfreed 77 bytes\n", "")
    assert chain.doit("clean", "--leftovers") == (0, "", "")


def test_clean_drops_digests_of_removed_files(chain: Chain) -> None:
    (chain.folder / "source").write_bytes(b"another source")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    for number in (5, 6):
        chain.path(number).unlink()
    said = "s6 - removing artifacts/s6\nfreed 2 digests of removed files\n"
    assert chain.doit("clean", "s6") == (0, said, "")
    assert (
        sum("/s5/a" in name for name in state_files.read(chain.folder / "artifacts/.mlxflow/digests.json")["files"])
        == 1
    )
