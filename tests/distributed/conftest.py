"""A project that trains a tiny model in a second, the model that one process makes of it, and ranks with faults."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxflow.distributed import launcher, supervisor
from mlxflow.distributed.rank_start import RankStart
from mlxflow.distributed.remote_rank import RemoteRank
from mlxflow.distributed.running_rank import RunningRank
from mlxflow.workflow import ranked_execution
from mlxflow.workflow.execution import run_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import write_notes

WORKFLOW = """
[workflow]
threads = 1
device = "cpu"

[workflow.distributed]
{distributed}

[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = {{ vocab_size = 300 }}

[train]
num_steps = 12
warmup_steps = 2
batch_size = 2
grad_accum_steps = 4
eval_every = 5
save_every = 2
log_every = 2
max_validation_rows = 13
{train}

[train.model]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
intermediate_size = 32
"""

FIXED = "dynamic_batch_size = false"

Build = Callable[..., bytes]
Alone = tuple[Path, bytes]


@pytest.fixture(scope="session")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a project with tokens, and the bytes of the model that one process trains."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    folder.mkdir()
    write_notes(folder / "notes")
    (folder / "workflow.toml").write_text(WORKFLOW.format(distributed="", train=FIXED))
    workflow = load_workflow(folder / "workflow.toml")
    for task in ("pretokenize", "train"):
        run_stage(workflow, workflow.find(task))
    return folder, (folder / "artifacts/train/model.safetensors").read_bytes()


@pytest.fixture
def train(trained_alone: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return a function that trains on ranks in a copy of the project, and returns the bytes of the model."""
    folder = tmp_path / "project"
    shutil.copytree(trained_alone[0], folder, ignore=shutil.ignore_patterns("train", "unfinished"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build(processes: int, *, train: str = FIXED, **distributed: Any) -> bytes:
        keys = {"processes": processes, "step_timeout": '"2 min"'} | distributed
        table = "".join(f"{key} = {value}\n" for key, value in keys.items())
        Path("workflow.toml").write_text(WORKFLOW.format(distributed=table, train=train))
        workflow = load_workflow(Path("workflow.toml"))
        run_stage(workflow, workflow.find("train"))
        assert not list(Path("artifacts/.mlxflow/ranks").glob("*"))
        return Path("artifacts/train/model.safetensors").read_bytes()

    return build


class Faults:
    """Signals that strike ranks, or this process, when a rank begins a step.

    Attributes:
        planned: (rank, step) to the signal and its target: "rank" or "supervisor"; each strikes once.
        starts: of rank 0 so far.
        struck_at: when each signal struck, on the monotonic clock.
        started_at: when rank 0 started.
    """

    def __init__(self) -> None:
        self.planned: dict[tuple[int, int], tuple[signal.Signals, str]] = {}
        self.struck_at: list[float] = []
        self.started_at: list[float] = []

    @property
    def starts(self) -> int:
        return len(self.started_at)

    def look(self, rank: RunningRank) -> None:
        """Strike, if it is time."""
        for (number, step), (what, target) in list(self.planned.items()):
            if number == rank.number and rank.beat.step >= step:
                del self.planned[number, step]
                self.struck_at.append(time.monotonic())
                if target == "rank":
                    rank.signal(what)
                else:
                    os.kill(os.getpid(), what)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Return the faults of the ranks that the test starts."""
    planned = Faults()

    class Watched(launcher.RankProcess):
        def __init__(self, launch: launcher.Launch, start: RankStart) -> None:
            super().__init__(launch, start)
            if start.rank.number == 0:
                planned.started_at.append(time.monotonic())

        def read(self, pipe: int) -> bool:
            is_alive = super().read(pipe)
            planned.look(self)
            return is_alive

    class WatchedRemote(RemoteRank):
        def read(self, pipe: int) -> bool:
            is_alive = super().read(pipe)
            planned.look(self)
            return is_alive

    monkeypatch.setattr(supervisor, "RankProcess", Watched)
    monkeypatch.setattr(launcher, "RemoteRank", WatchedRemote)
    yield planned
    assert not planned.planned


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Return a function that lets rank 1 have a fault in its third pass; see `faulty_rank`."""
    arguments = ranked_execution._arguments

    def strike(name: str) -> None:
        def faulty(*given: Any) -> tuple[str, ...]:
            script = Path(__file__).with_name("faulty_rank.py")
            return (str(script), name, str(tmp_path / "struck"), *arguments(*given)[2:])

        monkeypatch.setattr(ranked_execution, "_arguments", faulty)

    return strike
