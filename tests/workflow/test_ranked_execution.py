import json
import os
from pathlib import Path

import pytest

from mlxflow.distributed import supervisor
from mlxflow.distributed.launcher import Launch
from mlxflow.distributed.rank import Rank
from mlxflow.messages.errors import WorkflowError
from mlxflow.workflow import ranked_execution
from mlxflow.workflow.handover import Basis, Handover
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow

TEXT = """
[workflow]
device = "cpu"
threads = 2
[workflow.distributed]
processes = 2
step_timeout = "90 s"
restarts = 5
reduction = "fast"
[pretokenize]
[train]
grad_accum_steps = 2
[[quantize]]
name = "q4"
"""


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.chdir(tmp_path)
    Path("workflow.toml").write_text(TEXT)
    return load_workflow(Path("workflow.toml"))


def test_only_stages_that_train_have_ranks(workflow: Workflow) -> None:
    assert {one.task: one.ranks for one in workflow.stages} == {"pretokenize": 1, "train": 2, "quantize:q4": 1}
    assert [one.node().ranks for one in workflow.stages] == ["", "2 ranks (ring)", ""]


@pytest.mark.parametrize("change", ["processes = 1", 'reduction = "ordered"', "restarts = 0", 'step_timeout = "1 h"'])
def test_no_key_of_the_table_makes_an_artifact_stale(workflow: Workflow, change: str) -> None:
    key = change.partition(" ")[0]
    lines = [change if line.startswith(f"{key} ") else line for line in TEXT.splitlines()]
    assert change in lines
    Path("other.toml").write_text("\n".join(lines))
    other = load_workflow(Path("other.toml"))
    assert [one.settings() for one in other.stages] == [one.settings() for one in workflow.stages]


def test_the_ranks_get_the_workflow_that_was_read_and_the_limits_of_the_table(
    workflow: Workflow, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, Launch, supervisor.RestartLimits]] = []
    monkeypatch.setattr(supervisor, "supervise", lambda *given: started.append(given))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    stage = workflow.find("train")
    ranked_execution.run_ranks(workflow, stage, None, None)
    ranked_execution.run_ranks(workflow, stage, Path("other"), Handover(Basis("x", []), {}, None))
    (task, launch, limits), (_, other, _) = started
    assert (task, launch.size, launch.backend, launch.reduction) == ("train", 2, "ring", "fast")
    assert limits == supervisor.RestartLimits("90 s", 90.0, 5)
    assert [log.as_posix() for log in launch.logs] == [
        "artifacts/logs/train-rank-0.log",
        "artifacts/logs/train-rank-1.log",
    ]
    assert launch.command[2:] == ("-m", "mlxflow", "run", "train", "--workflow=workflow.toml")
    assert other.command[-1] == "--into=other"
    basis, settings, inputs = json.loads(launch.data)
    assert basis[0] == TEXT
    assert settings["config"]["grad_accum_steps"] == 2
    assert inputs is None
    assert json.loads(other.data) == [["x", []], {}, None]
    advice = (
        "workflow.threads = 2: 2 ranks with 2 threads each share 2 processors. Set workflow.threads = 1 for speed.\n"
    )
    assert capfd.readouterr().err == 2 * advice


def test_other_ranks_write_into_the_state_folder(workflow: Workflow) -> None:
    folder = ranked_execution.folder_of_rank(workflow, workflow.find("quantize:q4"), Rank(3, 4))
    assert folder == Path("artifacts/.mlxflow/ranks/quantize/q4/3")


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ("grad_accum_steps = 2\ndynamic_batch_size = false", 2),
        ("dynamic_batch_size = false", 1),
        ("batch_size = 2", 2),
        ("batch_size = 2\ngrad_accum_steps = 2\nconstant_tokens_per_step = false", 2),
    ],
)
def test_more_ranks_than_forward_passes_in_an_update_are_refused(tmp_path: Path, keys: str, most: int) -> None:
    path = tmp_path / "workflow.toml"
    path.write_text(f"[workflow.distributed]\nprocesses = 3\n[pretokenize]\n[train]\n{keys}\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        f"{path}: workflow.distributed.processes = 3: expected at most {most}, the forward passes in an update of "
        "train. Lower it, or raise train.grad_accum_steps.",
    )


@pytest.mark.parametrize("text", ["0 s", "169 h"])
def test_a_timeout_of_nothing_or_of_more_than_a_week_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "workflow.toml"
    path.write_text(f'[workflow.distributed]\nstep_timeout = "{text}"\n[workflow]\ndevice = "cpu"\n')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        f'{path}: workflow.distributed.step_timeout = "{text}": expected more than 0 s and at most 168 h. '
        'Use "10 min" (the default).',
    )


def test_split_layers_need_a_backend_with_a_reduce_scatter_and_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "workflow.toml"
    table = "[workflow.distributed]\nprocesses = 2\nsharding = 'full'\n"
    for keys, expected in (
        (
            'backend = "ring"\nreduction = "fast"\n',
            'sharding = "full": the backend ring has no reduce-scatter; expected nccl or jaccl. Remove it, or use '
            "optimizer_sharding = true.",
        ),
        (
            'backend = "nccl"\n',
            'sharding = "full": the backend adds the gradients of split layers, so reduction must be "fast". '
            'Add reduction = "fast".',
        ),
        (
            'backend = "nccl"\nreduction = "fast"\noptimizer_sharding = true\n',
            'optimizer_sharding = true: sharding = "full" includes it. Remove it.',
        ),
    ):
        path.write_text(table + keys)
        with pytest.raises(WorkflowError) as caught:
            load_workflow(path)
        assert caught.value.problems == (f"{path}: workflow.distributed.{expected}",)


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_frozen_layers_beside_adapters_are_split_without_a_reduce_scatter(
    tmp_path: Path, good_llama: Path, backend: str
) -> None:
    path = tmp_path / "workflow.toml"
    table = f"[workflow.distributed]\nprocesses = 2\nsharding = 'full'\nbackend = '{backend}'\n[pretokenize]\n"
    adapters = f"method = 'lora'\ngrad_accum_steps = 2\nmodel = {{ from = '{good_llama}' }}\n"
    aware = "[quantize]\nmethod = 'qat'\ntraining = 'lora'\ngrad_accum_steps = 2\n"
    path.write_text(f"{table}[train]\n{adapters}{aware}")
    assert load_workflow(path).find("train").ranks == 2
    path.write_text(f"{table}[train]\n{adapters}{aware.replace('lora', 'full')}")
    with pytest.raises(WorkflowError, match=f"the backend {backend} has no reduce-scatter"):
        load_workflow(path)


def test_mistakes_in_the_table_are_reported_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "workflow.toml"
    path.write_text(
        '[workflow]\ndevice = "cpu"\n[workflow.distributed]\nbackend = "nccl"\nprocesses = 0\nstep_timeout = "soon"\n'
        'host = "h"\n'
    )
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    keys = [line.removeprefix(f"{path}: workflow.distributed.").partition(":")[0] for line in caught.value.problems]
    assert keys == ["processes = 0", 'step_timeout = "soon"', "host"]
