"""Several doits and several stages at once."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlxflow.storage import atomic_folders
from mlxflow.storage.locks import hold
from tests.chain import Chain
from tests.conftest import mlxflow


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "chain")


def _go_on(chain: Chain) -> None:
    (chain.folder / "go").write_text("")


def test_a_second_doit_waits_for_the_first_and_rebuilds_nothing(chain: Chain) -> None:
    first, _ = chain.pause_in(3)
    second = chain.start()
    assert second.stderr
    line = second.stderr.readline()
    assert line == (
        f"another doit (process {first.pid}) is using these artifacts; doit --no-wait does not wait for it\n"
    )
    _go_on(chain)
    assert first.communicate()[0].count("never built") == 6
    out, _ = second.communicate()
    assert second.returncode == 0
    assert out.splitlines() == [f"-- s{i}" for i in range(1, 7)]
    chain.assert_correct()


def test_a_second_doit_that_does_not_wait_fails(chain: Chain) -> None:
    first, _ = chain.pause_in(1)
    assert chain.doit("--no-wait") == (
        1,
        "",
        f"another doit (process {first.pid}) is using these artifacts\n",
    )
    _go_on(chain)
    first.communicate()
    assert first.returncode == 0


def test_files_left_by_a_crash_are_removed_by_the_next_run_of_any_stage(chain: Chain) -> None:
    assert chain.doit()[0] == 0
    left = [chain.folder / "artifacts" / name for name in (".s9.partial", "s1/.v.partial", ".mlxflow/reproduce-x")]
    for folder in left:
        folder.mkdir()
        (folder / "half").write_text("half")
    assert chain.numbers_that_run() == []
    assert not any(folder.exists() for folder in left)


def test_mlxflow_run_waits_for_doit(job: Path) -> None:
    with hold(job / "artifacts/.mlxflow/lock", "", wait=False):
        environment = {**os.environ, "XDG_CACHE_HOME": str(job.parent / "cache")}
        command = [sys.executable, "-m", "mlxflow", "run", "pretokenize"]
        with subprocess.Popen(command, cwd=job, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr
            line = process.stderr.readline()
            assert line == f"pretokenize: waits for the artifacts, used by process {os.getpid()}\n"
            assert not (job / "artifacts/pretokenize").exists()
            process.kill()


def test_read_only_commands_take_no_lock(chain: Chain) -> None:
    first, _ = chain.pause_in(2)
    assert chain.doit("plan")[0] == 0
    _go_on(chain)
    first.communicate()


def test_a_single_stage_with_stale_inputs_is_refused(chain: Chain) -> None:
    assert chain.doit()[0] == 0
    (chain.folder / "source").write_bytes(b"another")
    code, out, err = chain.doit("-s", "s3")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "s3: reads from s1, which is stale (source source changed). Run: mlxflow build s3",
        "s3: reads from s2, which is stale (because s1 runs). Run: mlxflow build s3",
    ]
    (chain.folder / "source").write_bytes(b"the source")
    chain.path(3).unlink()
    assert chain.doit("-s", "s3")[:2] == (0, ".  s3: artifacts/s3/a is missing\n")


def _two(tmp_path: Path, one: dict[str, str], other: dict[str, str]) -> tuple[Chain, Chain]:
    """Return two workflows of one user, whose stages use the device."""
    first = Chain(tmp_path / "one", uses_device=True, **one)
    second = Chain(tmp_path / "other", uses_device=True, **other)
    (second.folder / "cache").symlink_to(first.folder / "cache")
    return first, second


@pytest.mark.parametrize(
    ("kind", "other", "what"),
    [
        ({"device": "cpu", "bound_device": "cpu"}, {"device": "cpu"}, "measurements on this machine to end"),
        ({"device": "cpu"}, {"device": "cpu", "bound_device": "cpu"}, "the device"),
    ],
    ids=["others wait for a measurement", "a measurement waits for others"],
)
def test_a_measuring_stage_runs_alone_across_workflows(
    tmp_path: Path, kind: dict[str, str], other: dict[str, str], what: str
) -> None:
    one, two = _two(tmp_path, kind, other)
    first, _ = one.pause_in(2)
    second = two.start("s1")
    assert second.stderr
    holder = f"process {first.pid} (s2 of {one.folder})"
    assert second.stderr.readline() == f"s1: waits for {what}, used by {holder}\n"
    assert not two.path(1).exists()
    _go_on(one)
    assert first.wait() == 0
    assert second.wait() == 0
    for process in (first, second):
        process.communicate()
    assert two.path(1).exists()


def test_stages_that_do_not_measure_run_at_once_across_workflows(tmp_path: Path) -> None:
    one, other = _two(tmp_path, {"device": "cpu"}, {"device": "cpu"})
    first, _ = one.pause_in(2)
    assert other.doit("s1") == (0, ".  s1: never built\n", "at work on s1\n")
    _go_on(one)
    first.communicate()
    assert first.returncode == 0


@pytest.mark.parametrize("options", [["-n", "2", "-P", "thread"], ["-n", "2"]])
def test_stages_of_one_doit_use_the_device_one_at_a_time(chain: Chain, options: list[str]) -> None:
    (chain.folder / "dodo.py").write_text(f"MEET = {ALONE!r}\n{PARALLEL}".replace("uses_device=False", "device='cpu'"))
    code, out, err = chain.doit("run", *options)
    assert code == 0, out + err
    assert sorted(out.splitlines()) == [".  s1: never built", ".  s2: never built"]


PARALLEL = """
import sys
from pathlib import Path
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.creator import configuration, tasks_of
from mlxflow.workflow.stage_node import Node

state = Path("artifacts/.mlxflow")
cache = DigestCache(state / "digests.json")
nodes = [
    Node(task=f"s{i}", doc="", root=Path("."), folder=f"artifacts/s{i}", inputs=("source",),
         outputs=(f"artifacts/s{i}/a",), settings={}, uses_device=False,
         command=(sys.executable, "-c", MEET, f"s{i}"))
    for i in (1, 2)
]
DOIT_CONFIG = configuration(nodes, state)

def task_stages():
    yield from tasks_of(nodes, cache)
"""

# Each of two stages opens one pipe to read and the other to write, which neither can do alone.
MEET = """
import sys
from pathlib import Path
name = sys.argv[1]
for pipe, mode in (("p", "r"), ("q", "w")) if name == "s1" else (("p", "w"), ("q", "r")):
    open(pipe, mode).close()
Path(f"artifacts/{name}").mkdir()
Path(f"artifacts/{name}/a").write_text(name)
"""

# One that finds the other at work fails.
ALONE = """
import sys, time
from pathlib import Path
name = sys.argv[1]
Path("at-work").mkdir()
time.sleep(0.3)
Path("at-work").rmdir()
Path(f"artifacts/{name}").mkdir()
Path(f"artifacts/{name}/a").write_text(name)
"""


@pytest.mark.parametrize("options", [["-n", "2", "-P", "thread"], ["-n", "2"]])
def test_independent_stages_run_side_by_side(chain: Chain, options: list[str]) -> None:
    for name in ("p", "q"):
        os.mkfifo(chain.folder / name)
    (chain.folder / "dodo.py").write_text(f"MEET = {MEET!r}\n{PARALLEL}")
    code, out, err = chain.doit("run", *options)
    assert code == 0, out + err
    assert sorted(out.splitlines()) == [".  s1: never built", ".  s2: never built"]
    assert sorted(chain.doit()[1].splitlines()) == ["-- s1", "-- s2"]


def test_a_failure_does_not_affect_independent_stages(chain: Chain) -> None:
    assert chain.doit()[0] == 0
    (chain.folder / "source").write_bytes(b"another")
    assert chain.stop_in(2, "stage killed") == 1
    code, out, _ = chain.doit("plan")
    assert code == 0
    assert out.startswith("s2: artifacts/s1/a changed\n")  # its seconds went with its record: these have no report


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", 0) as file:
        for _ in range(5):  # the kernel counts free pages by processor, and may find some later
            with suppress(OSError):
                while file.write(b"x" * 1024):
                    pass
            time.sleep(0.1)
    return filler


def test_a_full_disk_fails_the_stage_and_keeps_the_old_artifact(chain: Chain, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "96k") as small:
        (chain.folder / "artifacts").symlink_to(small)
        assert chain.doit()[0] == 0
        before = chain.found()
        filler = _fill(small)
        (chain.folder / "source").write_bytes(b"another")
        code, _, err = chain.doit()
        assert code != 0
        assert "No space left on device" in err
        after, expected = chain.found(), chain.expected()
        assert all(after[number] in (before[number], expected[number]) for number in after)
        assert after[6] == before[6]
        filler.unlink()
        assert chain.numbers_that_run()[-1] == 6
        chain.assert_correct()


def test_a_real_stage_on_a_full_disk_reports_the_needed_space_in_one_line(job_copy: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1200k") as small:
        shutil.copytree(job_copy / "artifacts/pretokenize", small / "pretokenize")
        shutil.copytree(job_copy / "artifacts/train", small / "train")
        shutil.rmtree(job_copy / "artifacts")
        (job_copy / "artifacts").symlink_to(small)
        before = (small / "train/model.safetensors").read_bytes()
        with (small / "filler").open("wb") as filler:
            filler.write(b"x" * (shutil.disk_usage(small).free - 200_000))
        result = mlxflow(job_copy, "run", "train")
        assert result.returncode == 1
        line = result.stderr.splitlines()[-1]
        assert re.fullmatch(r"model\.safetensors: needs [\d.]+ kB, [\d.]+ kB are free in .*small\. Make room\.", line)
        assert "Traceback" not in result.stderr
        assert (small / "train/model.safetensors").read_bytes() == before
        assert atomic_folders.partial_folders(small) == []


@pytest.mark.parametrize("room", [20_000, 100_000, 180_000])
def test_a_corpus_that_fills_the_disk_fails_in_one_line_and_resumes_once_there_is_room(
    job: Path, tmp_path: Path, room: int
) -> None:
    with small_disk(tmp_path / "small", "3m") as small:
        (job / "artifacts").symlink_to(small)
        filler = small / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(small).free - room))
        result = mlxflow(job, "run", "pretokenize")
        assert result.returncode == 1, result.stderr
        assert "No space left on device" in result.stderr or "Make room." in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (small / "pretokenize").exists()
        assert atomic_folders.partial_folders(small) == []
        assert list(small.glob(".mlxflow/shards/.*.partial")) == []
        filler.unlink()
        again = mlxflow(job, "run", "pretokenize")
        assert again.returncode == 0, again.stderr


def test_a_read_only_disk_fails_the_stage_in_one_line(job_copy: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "8m") as small:
        shutil.copytree(job_copy / "artifacts", small, dirs_exist_ok=True)
        shutil.rmtree(job_copy / "artifacts")
        (job_copy / "artifacts").symlink_to(small)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        result = mlxflow(job_copy, "run", "quantize:q4")
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert "cannot be written (Read-only file system; " in result.stderr
        assert result.stderr.endswith("artifacts/quantize/q4 is unchanged.\n")


def test_on_a_read_only_disk_only_commands_that_write_fail(chain: Chain, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as small:
        (chain.folder / "artifacts").symlink_to(small)
        assert chain.doit()[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert chain.numbers_that_run() == []
        (chain.folder / "source").write_bytes(b"another")
        code, out, err = chain.doit()
        assert (code, out) == (1, ".  s1: source source changed\n")
        said = "Let it be written or choose another folder."
        assert err == f"artifacts/.mlxflow/state.jsonl: Read-only file system. {said}\n"
