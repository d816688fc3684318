"""A chain of six cheap stages built by the real machinery: s1 reads `source`, each later one what the one before made.

Stages are processes that publish like the real ones. One that finds a file `pause-NAME` stops half-way, tells its
process id through the pipe `ready` and waits to be ended.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

DODO = """
import sys
from pathlib import Path
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.creator import configuration, tasks_of
from mlxflow.workflow.stage_node import Node

state = Path("artifacts/.mlxflow")
cache = DigestCache(state / "digests.json")
def salt(i):
    return Path(f"salt-s{i}").read_text() if Path(f"salt-s{i}").exists() else ""
nodes = [
    Node(
        task=f"s{i}", doc=f"stage {i}", root=Path("."), folder=f"artifacts/s{i}",
        inputs=("source" if i == 1 else f"artifacts/s{i - 1}/a",), outputs=(f"artifacts/s{i}/a",),
        settings={"seed": 0, "version": 1, "config": {"salt": salt(i)}},
        command=(sys.executable, "stage.py", f"s{i}"), **KIND,
    )
    for i in range(1, 7)
]
DOIT_CONFIG = configuration(nodes, state)

def task_stages():
    yield from tasks_of(nodes, cache)
"""

STAGE = """
import os, sys
from pathlib import Path
from mlxflow.storage import atomic_folders
from mlxflow.device.child_processes import end_with_parent
from tests.chain import transform

end_with_parent()
name = sys.argv[1]
number = int(name[1:])
read = Path("source" if number == 1 else f"artifacts/s{number - 1}/a").read_bytes()
salt = Path(f"salt-{name}").read_text() if Path(f"salt-{name}").exists() else ""
data = transform(read, name + salt)
print("at work on", name, flush=True)
with atomic_folders.publishing(Path(f"artifacts/{name}")) as private, (private / "a").open("wb") as file:
    file.write(data[:500])
    file.flush()
    if Path(f"pause-{name}").exists():
        with open("ready", "w") as ready:
            ready.write(str(os.getpid()))
        with open("go") as go:
            go.read()
    file.write(data[500:])
"""


def transform(data: bytes, name: str) -> bytes:
    """Return what a stage makes of its input: 1,000 bytes that depend on every bit of it."""
    return hashlib.shake_256(name.encode() + b":" + data).digest(1000)


class Chain:
    """The chain in a folder."""

    def __init__(self, folder: Path, *, uses_device: bool = False, **kind: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "dodo.py").write_text(DODO.replace("KIND", repr({"uses_device": uses_device, **kind})))
        (folder / "stage.py").write_text(STAGE)
        (folder / "source").write_bytes(b"the source")

    def path(self, number: int) -> Path:
        return self.folder / f"artifacts/s{number}/a"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        repository = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": repository, "XDG_CACHE_HOME": str(self.folder / "cache")}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "doit", *arguments]
        return subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=pipe, text=True, env=environment)

    def doit(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        return process.returncode, out, err

    def numbers_that_run(self) -> list[int]:
        code, out, err = self.doit()
        assert code == 0, out + err
        return [int(number) for number in re.findall(r"^\.  s(\d): ", out, re.MULTILINE)]

    def expected(self) -> dict[int, bytes]:
        """Return what the sources of now make of each artifact."""
        data, expected = (self.folder / "source").read_bytes(), {}
        for number in range(1, 7):
            salt = self.folder / f"salt-s{number}"
            data = transform(data, f"s{number}" + (salt.read_text() if salt.exists() else ""))
            expected[number] = data
        return expected

    def found(self) -> dict[int, bytes]:
        """Return each artifact as it is."""
        return {number: self.path(number).read_bytes() for number in range(1, 7)}

    def assert_correct(self) -> None:
        """Every artifact is what the sources of now make of it."""
        assert self.found() == self.expected()

    def pause_in(self, number: int, *arguments: str) -> tuple[subprocess.Popen[str], int]:
        """Start doit and return it with the process of a stage that has stopped half-way."""
        for name in ("ready", "go"):
            if not (self.folder / name).exists():
                os.mkfifo(self.folder / name)
        pause = self.folder / f"pause-s{number}"
        pause.touch()
        process = self.start(*arguments)
        stage = self.stopped_stage(process)
        pause.unlink()
        return process, stage

    def stopped_stage(self, process: subprocess.Popen[str]) -> int:
        """Return the process id that a stage writes into `ready` once it has stopped; fail if doit ends before."""
        descriptor = os.open(self.folder / "ready", os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as ready:  # noqa: PTH123
            while not (text := ready.read()):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
        return int(text)

    def stop_in(self, number: int, how: str) -> int:
        """Build, and end doit or the stage half-way through a stage; return doit's exit code."""
        import psutil

        process, stage = self.pause_in(number)
        watched = psutil.Process(stage)
        if how == "stage killed":
            os.kill(stage, signal.SIGKILL)
        else:
            process.send_signal({"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}[how])
        process.communicate(timeout=60)
        psutil.wait_procs([watched], timeout=20)
        assert not watched.is_running(), "the stage outlived doit"
        return process.returncode
