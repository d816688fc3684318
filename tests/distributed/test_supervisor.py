import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mlxflow.distributed import running_rank, supervisor
from mlxflow.distributed.launcher import Launch
from mlxflow.distributed.memory_deaths import MemoryDeaths
from mlxflow.distributed.supervisor import RestartLimits, supervise
from mlxflow.messages.errors import StageError, UserError
from mlxflow.storage.regular_files import open_log

Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that supervises ranks that follow a script; see `fake_rank`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "_CAUSE_SECONDS", 0.5)

    def start(script: str, *, size: int = 2, restarts: int = 0, timeout: float = 60.0) -> None:
        supervise(
            "train",
            Launch(
                command=(sys.executable, str(Path(__file__).with_name("fake_rank.py"))),
                data=script.encode(),
                size=size,
                backend="ring",
                reduction="ordered",
                shards_optimizer=False,
                shards_layers=False,
                logs=[Path(f"rank-{number}.log") for number in range(size)],
                open_log=open_log,
                threads=0,
                hosts=None,
                remotes=None,
            ),
            RestartLimits(f"{timeout:g} s", timeout, restarts),
        )
        assert not psutil.Process().children()

    return start


def test_ranks_that_end_well_are_done_and_their_output_is_prefixed_and_logged(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run("all beat 1 forward pass; 0 print one; 1 print two; all done")
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == ["rank 0: one", "rank 1: two"]
    assert [Path(f"rank-{number}.log").read_text() for number in range(2)] == ["one\n", "two\n"]


def test_a_killed_rank_ends_all_and_is_named_with_its_step(run: Run) -> None:
    with pytest.raises(StageError) as caught:
        run("0 wait 3 check before the sum of gradients; 0 sleep 60; 1 beat 3 forward pass; 1 kill SIGKILL")
    assert str(caught.value) == (
        "train: rank 1 ended with signal SIGKILL at step 3 (forward pass). See rank-1.log. Run it again, which resumes "
        "from the last checkpoint."
    )


def test_the_rank_that_was_killed_is_named_and_not_those_that_lost_it(run: Run) -> None:
    script = "0 beat 3 update; 0 fail peer 1 [ring] lost; 1 beat 3 forward pass; 1 sleep 0.3; 1 kill SIGKILL"
    with pytest.raises(StageError, match=r"^train: rank 1 ended with signal SIGKILL at step 3 \(forward pass\)\. "):
        run(script)


def test_all_ranks_start_again_as_often_as_the_limit_says(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError) as caught:
        run("0 sleep 60; 1 beat 0 validation; 1 exit 7", restarts=2)
    again = "all ranks start again from the last checkpoint"
    cause = "train: rank 1 ended with exit code 7 before step 1 (validation)"
    assert capfd.readouterr().err.splitlines() == [
        f"{cause}; {again} (restart 1 of 2)",
        f"{cause}; {again} (restart 2 of 2)",
    ]
    assert str(caught.value) == (
        f"{cause} after 2 restarts. See rank-1.log. Run it again, which resumes from the last checkpoint."
    )


def test_a_restart_that_succeeds_is_a_success(run: Run) -> None:
    run("1 once begun; 1 beat 1 x; 1 fail error 1 ValueError: odd; all done", restarts=1)


def test_a_rank_that_hangs_after_it_said_why_it_ends_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_rank, "END_SECONDS", 0.5)
    with pytest.raises(StageError, match=r"^train: rank 1 failed at step 3 \(update\): ValueError: odd\. "):
        run("0 wait 3 sum of gradients; 0 sleep 60; 1 beat 3 update; 1 hang ValueError: odd")


def test_ranks_start_again_with_fewer_rows_until_the_memory_is_enough_and_no_restart_is_counted(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run("0 sleep 1; 1 rows 4; 1 beat 3 update; 1 need 2; all done", restarts=0)
    again = "all ranks start again from the last checkpoint with fewer than"
    assert capfd.readouterr().err.splitlines() == [
        f"train: rank 1 ran out of memory at step 3 (update); {again} {rows} rows in a forward pass" for rows in (4, 3)
    ]


def test_memory_that_fewer_rows_would_not_save_ends_the_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError) as caught:
        run("0 sleep 60; 1 beat 3 validation; 1 rows 1; 1 need 0", restarts=3)
    assert str(caught.value) == "train: out of memory: 12 more bytes needed."
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("is_for_memory", [True, False])
def test_a_rank_that_the_kernel_killed_for_memory_comes_back_with_fewer_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], is_for_memory: bool
) -> None:
    monkeypatch.setattr(MemoryDeaths, "explains", lambda self, code: is_for_memory)
    run("1 once begun; 1 rows 4; 1 beat 3 update; 1 kill SIGKILL; all done", restarts=1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train: rank 1 " + ("ran out of memory" if is_for_memory else "ended with signal SIGKILL"))
    assert line.endswith("with fewer than 4 rows in a forward pass" if is_for_memory else "(restart 1 of 1)")


def test_a_start_that_fails_is_not_repeated_and_said_in_one_line(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    for script, reason in (
        (
            "0 sleep 60; 1 print Traceback; 1 print ModuleNotFoundError: No module named 'mlx'; 1 exit 1",
            "ended with exit code 1 before the training (start): ModuleNotFoundError: No module named 'mlx'",
        ),
        ("0 sleep 60; 1 exit 0", "ended with exit code 0 before the training (start)"),
        ("1 fail error 1 ValueError: odd", "failed before the training (start): ValueError: odd"),
    ):
        with pytest.raises(StageError) as caught:
            run(script, restarts=3)
        assert str(caught.value) == f"train: rank 1 {reason}. See rank-1.log."
        assert capfd.readouterr().err == ""


def test_the_same_error_at_the_same_step_ends_the_run_after_one_restart(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError) as caught:
        run("0 sleep 60; 1 beat 2 update; 1 fail error 1 ValueError: odd", restarts=3)
    cause = "train: rank 1 failed at step 2 (update): ValueError: odd"
    assert str(caught.value) == f"{cause}, as before the last restart. See rank-1.log."
    assert capfd.readouterr().err.splitlines() == [
        f"{cause}; all ranks start again from the last checkpoint (restart 1 of 3)"
    ]


def test_a_rank_that_ends_before_its_training_is_over_has_failed(run: Run) -> None:
    with pytest.raises(StageError, match=r"^train: rank 1 ended with exit code 0 at step 2 \(update\)\. "):
        run("0 sleep 60; 1 beat 2 update")


@pytest.mark.parametrize("code", [0, 2])
def test_ranks_that_end_at_once_and_say_nothing_have_failed(run: Run, code: int) -> None:
    with pytest.raises(StageError, match=rf"^train: rank \d ended with exit code {code} before the training \(start\)"):
        run(f"all exit {code}")


def test_a_silent_rank_is_ended_after_the_timeout_and_named_with_what_the_others_waited_in(run: Run) -> None:
    with pytest.raises(StageError) as caught:
        run(
            "0 until began; 0 beat 4 forward pass; 0 touch beaten; "
            "1 touch began; 1 until beaten; 1 wait 4 reading of the memory; all sleep 60",
            timeout=2.0,
        )
    assert str(caught.value).startswith(
        "train: rank 0 made no progress for 2 s at step 4 (forward pass); rank 1 waited in: reading of the memory. "
    )


def test_a_stopped_rank_is_named_as_stopped(run: Run) -> None:
    with pytest.raises(StageError, match=r"^train: rank 1 made no progress for 2 s at step 4 \(sum\) and is stopped; "):
        run(
            "0 until began; 0 wait 4 sum; 0 touch waiting; "
            "1 touch began; 1 until waiting; 1 wait 4 sum; 1 kill SIGSTOP; all sleep 60",
            timeout=2.0,
        )


def test_a_stopped_rank_is_named_before_one_that_computes(run: Run) -> None:
    with pytest.raises(
        StageError, match=r"^train: rank 1 made no progress for 2 s at step 4 \(sum\) and is stopped\. "
    ):
        run(
            "0 until began; 0 beat 4 forward pass; 0 touch waiting; "
            "1 touch began; 1 until waiting; 1 wait 4 sum; 1 kill SIGSTOP; all sleep 60",
            timeout=2.0,
        )


def test_a_rank_that_others_wait_for_before_the_training_has_the_same_time(run: Run) -> None:
    with pytest.raises(StageError, match=r"^train: rank 1 made no progress for 0\.5 s before the training \(start\); "):
        run("0 wait -1 joining the other ranks; all sleep 60", timeout=0.5)


def test_a_long_start_and_long_work_after_the_training_have_no_timeout(run: Run) -> None:
    run("all sleep 1.2; all beat 1 forward pass; all done; 0 sleep 1.2", timeout=1.0)


def test_a_mistake_of_the_user_is_raised_once_and_not_tried_again(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        run("all beat 1 x; all fail refused 2 train.batch_size: too large.", restarts=3)
    assert caught.value.problems == ("train.batch_size: too large.",)
    with pytest.raises(StageError, match=r"^the disk is full$"):
        run("0 fail refused 1 the disk is full; 1 sleep 60", restarts=3)
    assert capfd.readouterr().err == ""


def test_ports_that_were_taken_are_chosen_again_without_a_counted_restart(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run("0 once begun; 0 fail join 1 JoinError: [ring] Couldn't bind socket (error: 98); all done")
    assert capfd.readouterr().err.splitlines() == [
        "train: rank 0 could not join the others before the training (start): JoinError: [ring] Couldn't bind socket "
        "(error: 98); the ranks start again with other ports"
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_ranks_save_and_ends_the_run(
    run: Run, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(f"0 touch ready; 1 until ready; 1 signal {number.name}; all sleep 60", restarts=3)
    assert caught.value.code == 128 + number
    assert sorted(capfd.readouterr().err.splitlines()) == ["rank 0: saved", "rank 1: saved"]


def test_a_supervisor_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from mlxflow.distributed.launcher import Launch
from mlxflow.distributed.memory_deaths import MemoryDeaths
from mlxflow.distributed.supervisor import RestartLimits, supervise
from mlxflow.storage.regular_files import open_log
command = (sys.executable, "-c", {_ENDS_WITH_PARENT!r})
logs = [Path("0.log"), Path("1.log")]
launch = Launch(command, b"", 2, "ring", "ordered", False, False, logs, open_log, 0, None, None)
supervise("train", launch, RestartLimits("1 h", 3600, 0))
"""
    watching = psutil.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    lines = [watching.stderr.readline() for _ in range(2)]  # "rank 0: its process"
    ranks = [psutil.Process(int(line.split()[-1])) for line in lines]
    watching.kill()
    watching.wait()
    watching.stderr.close()
    assert not psutil.wait_procs(ranks, timeout=30)[1]


_ENDS_WITH_PARENT = (
    "import os, time; from mlxflow.device.child_processes import end_with_parent\n"
    "assert end_with_parent()\n"
    "import json\n"
    "print(os.getpid(), flush=True)\n"
    "os.write(int(os.environ['MLXFLOW_BEATS_FD']), b'{\"beat\": [-1, \"x\", false, false]}\\n')\n"
    "time.sleep(600)\n"
)
