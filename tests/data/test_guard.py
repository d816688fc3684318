"""Tests of the process that runs templates and tokenizers of others: its limits, its end, and what is left of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxflow.__main__ import main
from mlxflow.data import guard
from mlxflow.data.guard import Guard, ProcessLimits, guarded
from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.messages.errors import SourceError, StageError
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow

_USUAL = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def test_a_call_returns_or_raises_what_the_function_does() -> None:
    with Guard() as process:
        assert process.call("operator:mul", 3, 4) == 12
        with pytest.raises(ZeroDivisionError, match="division"):
            process.call("operator:truediv", 1, 0)
        assert process.call("operator:add", [1], [2]) == [1, 2]


def test_a_guarded_process_that_exits_is_named() -> None:
    with pytest.raises(StageError) as caught:
        guarded("os:_exit", 7)
    assert str(caught.value) == "the guarded process ended with code 7. Run it again."


def test_work_that_reads_no_untrusted_file_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LIMITS", ProcessLimits(0, 0, 0, 0))
    assert guarded("builtins:sum", range(10_000_000)) == 49_999_995_000_000


_SHORT, _SMALL = ProcessLimits(1, 0, 10**10, 0), ProcessLimits(60, 0, 600_000_000, 0)


class _Job:
    """A folder with a workflow that reads conversations; its temporary folder is its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(50)

    def write(self, count: int, text: str = "What is it?") -> None:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "It is so."}]
        lines = [json.dumps({"messages": [*messages, {"role": "user", "content": str(i)}]}) for i in range(count)]
        (self.folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def template(self, source: str) -> str:
        (self.folder / "own.jinja").write_text(source)
        return 'chat_template = "own.jinja"\ntokenizer.vocab_size = 300'

    def tokenizer(self, change: Callable[[dict[str, Any]], object] = lambda definition: None) -> str:
        folder = self.folder / "mine"
        folder.mkdir()
        file, trained = folder / "tokenizer.json", train_tokenizer(["It is so, it is so."], vocab_size=262)
        vocabulary = trained_vocabulary(trained.to_str(), context_length=16, template=_USUAL)
        save_vocabulary(vocabulary, tokenizer_file=file, config_file=folder / "tokenizer_config.json")
        definition = json.loads(file.read_text())
        change(definition)
        file.write_text(json.dumps(definition))
        return 'tokenizer.from = "mine"'

    def run(self, settings: str) -> None:
        text = f'[pretokenize]\nsources = ["a.jsonl"]\nholdout = 0.2\n{settings}\n'
        (self.folder / "workflow.toml").write_text(text)
        workflow = load_workflow(self.folder / "workflow.toml")
        execute_stage(workflow, workflow.find("pretokenize"))

    def fails(self, settings: str) -> str:
        """Run pretokenize, which must refuse with one line and leave nothing; return the line."""
        with pytest.raises(SourceError) as caught:
            self.run(settings)
        assert not (self.folder / "artifacts/pretokenize").exists()
        assert not list(self.folder.rglob("*.partial"))
        assert not list((self.folder / "tmp").iterdir())
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Job:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(guard, "LIMITS", _SHORT)
    return _Job(tmp_path)


_TEMPLATE = 'pretokenize.chat_template = "own.jinja": the chat template'
_MEMORY = "took over 0.6 GB of memory. Fix it or name another."


def test_show_limits_the_time_of_an_artifacts_tokenizer(job: _Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.run(job.tokenizer() + "\ncontext_length = 16")
    file = str(job.folder / "workflow.toml")
    capsys.readouterr()
    assert main(["show", "pretokenize", "--row", "0", "--workflow", file]) == 0
    assert "It is so." in capsys.readouterr().out
    tokenizer = job.folder / "artifacts/pretokenize/tokenizer.json"
    definition = json.loads(tokenizer.read_text())
    steps = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 2000}] * 2
    definition["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    tokenizer.write_text(json.dumps(definition))
    assert main(["show", "pretokenize", "--row", "0", "--workflow", file]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"{re.escape(str(tokenizer))} (makes a text|took over) .* Fix it or name another\\.\n", err)


def test_large_records_and_usual_files_are_within_the_limits(job: _Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LIMITS", ProcessLimits(seconds=5))
    job.write(3, text="What is it? Tell me all of it. " * 100_000)
    job.run(job.tokenizer() + "\ncontext_length = 16")
    assert (job.folder / "artifacts/pretokenize/train.safetensors").is_file()
    assert not list((job.folder / "tmp").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit of processor time does it, in minutes")
def test_the_guarded_process_ends_with_its_parent_even_in_c_code() -> None:
    code = (
        "from mlxflow.data.guard import Guard\n"
        "with Guard() as process:\n"
        "    print(process.call('os:getpid'), flush=True)\n"
        "    process.call('operator:pow', 9, 9**9)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        while child.cpu_times().user < 0.2:
            time.sleep(0.05)
        os.kill(parent.pid, signal.SIGKILL)
    child.wait(30)


_WAITS = """
import os, sys, threading, time
from pathlib import Path
from mlxflow.data.watched import Work, waiting

def wait(file):
    with Work("the tokenizer"):
        wait_unannounced(file)

def wait_unannounced(file):
    Path(file).touch()
    threading.Event().wait(60)

def wait_for_another(file, go):
    with waiting():
        Path(file).touch()
        begin = time.monotonic()
        while not Path(go).exists() and time.monotonic() < begin + 60:
            time.sleep(0.01)
    return Path(go).exists()

def leave_a_process(file):
    if (child := os.fork()) == 0:
        time.sleep(20)  # with everything that it inherited
        os.unlink(file)
        os._exit(0)
    with open(file, "w") as opened:
        opened.write(str(child))
    os._exit(7)

def begin_an_answer():
    frame = sys._getframe()
    while "calls" not in frame.f_locals:
        frame = frame.f_back
    os.write(frame.f_locals["calls"].fileno(), bytes([0, 0, 1, 0, 80]))
    os._exit(7)
"""


@pytest.fixture
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put functions for guarded processes on their path."""
    (tmp_path / "work_of_a_test.py").write_text(_WAITS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def _limit_idle_time(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[], float]) -> None:
    """Let a function return the limit at each check: on a busy machine the start of a process takes any time."""
    limits = type("Limits", (ProcessLimits,), {"idle_seconds": property(lambda _: seconds())})
    monkeypatch.setattr(guard, "LIMITS", limits())


_IN_A_CALL = "the guarded process, in work_of_a_test:wait_unannounced,"


@pytest.mark.usefixtures("_work")
@pytest.mark.parametrize(("function", "subject"), [("wait", "the tokenizer"), ("wait_unannounced", _IN_A_CALL)])
def test_a_process_in_a_deadlock_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, subject: str
) -> None:
    waits = tmp_path / "waits"
    _limit_idle_time(monkeypatch, lambda: 0.5 if waits.exists() else 600)
    with pytest.raises(StageError) as caught:
        guarded(f"work_of_a_test:{function}", str(waits))
    assert str(caught.value) == f"{subject} hangs: no processor time for 0.5 s. Run it again."


@pytest.mark.usefixtures("_work")
def test_a_process_that_hangs_before_it_reads_a_call_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is larger than a connection holds."""
    waits = tmp_path / "waits"
    code = f"import pathlib, threading\npathlib.Path({str(waits)!r}).touch()\nthreading.Event().wait(60)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    _limit_idle_time(monkeypatch, lambda: 0.5 if waits.exists() else 600)
    with pytest.raises(StageError) as caught:
        guarded("builtins:len", "x" * 10_000_000)
    assert str(caught.value) == (
        "the guarded process, in builtins:len, hangs: no processor time for 0.5 s. Run it again."
    )


def test_a_call_with_much_data_is_answered() -> None:
    assert guarded("builtins:len", "x" * 10_000_000) == 10_000_000


@pytest.mark.usefixtures("_work")
def test_a_process_that_waits_for_another_one_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, go = tmp_path / "waits", tmp_path / "go"
    num_checks = 0

    def seconds() -> float:
        nonlocal num_checks
        num_checks += waits.exists()
        if num_checks == 5:
            go.touch()
        return 0 if 1 < num_checks < 5 else 600  # the first check may have begun before

    _limit_idle_time(monkeypatch, seconds)
    assert guarded("work_of_a_test:wait_for_another", str(waits), str(go))


@pytest.mark.usefixtures("_work")
def test_the_end_of_the_process_is_seen_though_one_that_it_left_lives_on(tmp_path: Path) -> None:
    left = tmp_path / "left.pid"
    with pytest.raises(StageError, match=r"^the guarded process ended with code 7"):
        guarded("work_of_a_test:leave_a_process", str(left))
    os.kill(int(left.read_text()), signal.SIGKILL)  # at its end it would have removed the file


@pytest.mark.usefixtures("_work")
def test_the_end_of_the_process_within_an_answer_is_named() -> None:
    with pytest.raises(StageError, match=r"^the guarded process ended with code 7"):
        guarded("work_of_a_test:begin_an_answer")
