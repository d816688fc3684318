import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import StageError
from mlxflow.storage.run_context import RankSpeed
from mlxflow.workflow import rank_timing
from mlxflow.workflow.execution import run_stage
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from tests.conftest import write_notes

TEXT = """
[workflow]
device = "cpu"
threads = 1
[workflow.distributed]
processes = 2
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[[train]]
name = "a"
num_steps = 900
batch_size = 2
grad_accum_steps = 2
schedule = "wsd"
decay_steps = 800
warmup_steps = 50
patience = 3
keep = "best"
eval_every = 10
[train.model]
hidden_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 32
[[train]]
name = "b"
num_steps = 900
"""


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_notes(tmp_path / "notes")
    Path("workflow.toml").write_text(TEXT)
    return load_workflow(Path("workflow.toml"))


def test_only_the_timed_training_is_short_and_otherwise_the_same(workflow: Workflow) -> None:
    text = rank_timing.short_workflow(workflow, "train:a", 12, is_alone=True)
    tables = {table["name"]: table for table in tomllib.loads(text)["train"]}
    assert tables["a"]["num_steps"] == tables["a"]["log_every"] == 12
    assert tables["b"]["num_steps"] == 900
    short = load_workflow(workflow.path, data=text.encode())
    assert [one.task for one in short.stages] == ["pretokenize", "train:a"]
    assert short.find("train:a").ranks == 1
    settings: Any = short.find("train:a").config
    assert (settings.grad_accum_steps, settings.model.hidden_size, settings.max_batch_size) == (2, 32, 2)
    again = load_workflow(
        workflow.path, data=rank_timing.short_workflow(workflow, "train:a", 3, is_alone=False).encode()
    )
    assert again.find("train:a").ranks == 2


def test_one_process_and_all_ranks_are_timed_in_turns(workflow: Workflow, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(
        [
            {"tokens_per_second": 10.0},
            {"tokens_per_second": 17.0, "rank_waited_seconds": [1.0, 2.0]},
            {"tokens_per_second": 19.0, "rank_waited_seconds": [3.0, 2.0]},
            {"tokens_per_second": 12.0},
        ]
    )
    order = []

    def run(workflow: Workflow, task: str, num_steps: int, *, is_alone: bool) -> Any:
        order.append(is_alone)
        return next(runs)

    monkeypatch.setattr(rank_timing, "_run", run)
    assert rank_timing.time_ranks(workflow, "train:a", 20) == (
        RankSpeed(1, "", 11.0, ()),
        RankSpeed(2, "ring", 18.0, (2.0, 2.0)),
    )
    assert order == [True, False, False, True]
    Path("workflow.toml").write_text(TEXT.replace("processes = 2", "processes = 1"))
    assert rank_timing.time_ranks(load_workflow(workflow.path), "train:a", 20) == ()


def test_the_train_stage_itself_runs_and_leaves_nothing(workflow: Workflow) -> None:
    run_stage(workflow, workflow.find("pretokenize"))
    before = sorted(Path().rglob("*"))
    run = rank_timing._run(workflow, "train:a", 3, is_alone=False)
    assert run["ranks"] == len(run["rank_waited_seconds"]) == 2
    assert run["tokens_per_second"] > 0
    after = {path for path in Path().rglob("*") if "cache" not in path.parts and "logs" not in path.parts}
    assert after <= {*before, Path("artifacts/.mlxflow/ranks"), Path("artifacts/.mlxflow/ranks/train")}
    (Path("artifacts/pretokenize/train.safetensors")).unlink()
    with pytest.raises(
        StageError, match=r"^train:a: 3 updates on one process, for their speed, failed: .*train\.safetens"
    ):
        rank_timing._run(workflow, "train:a", 3, is_alone=True)
