"""Trainings on real ranks: the bytes of one process, whatever happens on the way."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file

from mlxflow.data.row_widths import mean_width
from mlxflow.data.token_file import TokenFile
from mlxflow.distributed import launcher, rank_start, supervisor
from mlxflow.messages.errors import StageError, UserError
from mlxflow.workflow import ranked_execution, ranks
from mlxflow.workflow.execution import run_stage
from mlxflow.workflow.loader import load_workflow
from tests.distributed import conftest
from tests.distributed.conftest import FIXED, WORKFLOW, Build, Faults

Alone = tuple[Path, bytes]


def _records(kind: str, folder: Path = Path(), *, stage: str = "train") -> list[dict[str, object]]:
    lines = (folder / f"artifacts/{stage}/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_killed_and_stopped_ranks_and_a_taken_port_change_no_byte(
    trained_alone: Alone,
    train: Build,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found: list[list[int]] = []

    def ports(count: int) -> list[int]:
        found.append(free_ports(count))
        return [found[-1][0], taken.getsockname()[1], *found[-1][2:]] if len(found) == 1 else found[-1]

    free_ports = rank_start.free_ports
    monkeypatch.setattr(launcher, "free_ports", ports)
    # no clock: a busy machine fails no test
    monkeypatch.setattr(supervisor._Watch, "_is_late", lambda watch, rank, waiting: rank.is_stopped)
    faults.planned = {
        (0, 4): (signal.SIGKILL, "rank"),
        (1, 8): (signal.SIGSTOP, "rank"),
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        model = train(2, step_timeout='"3 min"')
    assert model == trained_alone[1]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: rank")]
    assert len(said) == faults.starts - 1 == 3
    assert "could not join the others" in said[0]
    # a fast rank has begun the next step when the signal arrives
    assert re.match(r"train: rank 0 ended with signal SIGKILL at step [4-7] \(", said[1])
    assert re.match(r"train: rank 1 made no progress for 3 min at step ([89]|1\d) \(", said[2])
    assert "and is stopped" in said[2]
    assert said[2].endswith("(restart 2 of 3)")
    for kind, figures in (("train", ("step", "loss", "gradient_norm", "tokens")), ("validation", ("step", "loss"))):
        ours, alone = _records(kind), _records(kind, trained_alone[0])
        assert [[one[name] for name in figures] for one in ours] == [[one[name] for name in figures] for one in alone]


def test_a_run_stops_on_four_ranks_continues_on_two_and_ends_on_one_in_the_same_bytes(
    trained_alone: Alone, train: Build, faults: Faults, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = 0
    for processes, step in ((4, 3), (2, 7)):
        faults.planned = {(processes - 1, step): (signal.SIGTERM, "supervisor")}
        with pytest.raises(SystemExit) as caught:
            train(processes)
        assert caught.value.code == 128 + signal.SIGTERM
        found = re.search(r"rank 0: train: stopped after step (\d+); ", capfd.readouterr().err)
        assert found is not None
        stopped = int(found[1])
        assert stopped >= step  # the ranks may have begun the next step when the signal arrives
    assert train(1) == trained_alone[1]
    assert f"train: resumes from step {stopped} (" in capfd.readouterr().err


@pytest.mark.parametrize("reduction", ["ordered", "fast"])
def test_ranks_leave_out_the_padding_that_one_process_leaves_out(train: Build, reduction: str) -> None:
    """In order the bytes are those of one process; each pass has a width of its own."""
    random = np.random.default_rng(0)
    texts = ["x y" * int(size) for size in random.integers(1, 40, 60)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    workflow = WORKFLOW.replace('["notes"]', '["texts.jsonl"]').replace("context_length = 16", "context_length = 96")
    workflow = workflow.replace("vocab_size = 300 }}", 'vocab_size = 300 }}\npacking = "none"\nholdout = 0.1')
    models = []
    for table in ("", f'processes = 2\nstep_timeout = "2 min"\nreduction = "{reduction}"'):
        Path("workflow.toml").write_text(workflow.format(distributed=table, train=FIXED))
        loaded = load_workflow(Path("workflow.toml"))
        for task in ("pretokenize", "train"):
            run_stage(loaded, loaded.find(task))
        models.append(Path("artifacts/train/model.safetensors").read_bytes())
    marks = TokenFile.open(Path("artifacts/pretokenize/train.safetensors")).rows.marks
    assert mean_width(marks, 2) < 90
    if reduction == "ordered":
        assert models[1] == models[0]
    else:
        _require_close(*models)


def test_a_sharded_optimizer_ends_in_the_same_bytes_from_a_checkpoint_of_any_number_of_ranks(
    trained_alone: Alone, train: Build, faults: Faults
) -> None:
    faults.planned = {(1, 5): (signal.SIGKILL, "rank"), (0, 9): (signal.SIGTERM, "supervisor")}
    with pytest.raises(SystemExit):
        train(2, optimizer_sharding="true")
    assert train(1) == trained_alone[1]


def _give_reduce_scatter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the ranks of ring a reduce-scatter; return a file that exists when one was asked for its part of a sum."""
    script, marker = str(Path(__file__).with_name("scattering_rank.py")), tmp_path / "scattered"
    arguments = ranked_execution._arguments
    monkeypatch.setattr(ranked_execution, "_arguments", lambda *given: (script, str(marker), *arguments(*given)[2:]))
    monkeypatch.setattr(ranks, "SCATTERING", ("ring",))
    return marker


@pytest.fixture
def scatters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """See `_give_reduce_scatter`."""
    return _give_reduce_scatter(tmp_path, monkeypatch)


def _require_close(model: bytes, expected: bytes) -> None:
    """Check that weights differ by rounding only, see the test of a fast reduction."""
    found, others = safetensors.numpy.load(model), safetensors.numpy.load(expected)
    assert found.keys() == others.keys()
    for name, value in others.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max(), name


@pytest.mark.matrix
def test_a_reduce_scatter_gives_each_rank_its_part_of_the_same_sums(
    train: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(settings: str) -> bytes:
        shutil.rmtree("artifacts/train", ignore_errors=True)
        return train(2, train=f"{FIXED}\n{settings}\n", reduction='"fast"', optimizer_sharding="true")

    whole, unclipped = trained("max_grad_norm = 0.1"), trained("max_grad_norm = 0.0")
    scatters = _give_reduce_scatter(tmp_path, monkeypatch)
    assert trained("max_grad_norm = 0.0") == unclipped
    assert scatters.exists()
    # the norm is added in another order: 3e-7 of a gradient, and AdamW's steps barely depend on a scale of all
    _require_close(trained("max_grad_norm = 0.1"), whole)


SPLIT = {"reduction": '"fast"', "sharding": '"full"'}


@pytest.mark.matrix
@pytest.mark.parametrize("settings", ["", 'checkpointing = "layers"'])
def test_split_layers_learn_what_whole_ones_do(
    trained_alone: Alone, train: Build, scatters: Path, faults: Faults, settings: str
) -> None:
    faults.planned = {(1, 5): (signal.SIGKILL, "rank")}
    _require_close(train(2, train=f"{FIXED}\n{settings}\n", **SPLIT), trained_alone[1])
    assert scatters.exists()


@pytest.mark.matrix
def test_a_training_with_split_layers_goes_over_to_one_process_and_back(
    trained_alone: Alone, train: Build, scatters: Path, faults: Faults
) -> None:
    for distributed in (SPLIT, {}):
        faults.planned = {(0, 4 if distributed else 8): (signal.SIGTERM, "supervisor")}
        with pytest.raises(SystemExit):
            train(2, **distributed)
    _require_close(train(2, **SPLIT), trained_alone[1])
    shutil.rmtree("artifacts/train")
    faults.planned = {(0, 6): (signal.SIGTERM, "supervisor")}
    with pytest.raises(SystemExit):
        train(2, **SPLIT)
    _require_close(train(1), trained_alone[1])


@pytest.mark.matrix
def test_a_rank_without_rows_takes_part_in_the_passes_of_the_others(
    train: Build, scatters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "WORKFLOW", WORKFLOW.replace("grad_accum_steps = 4", "grad_accum_steps = 3"))
    split = train(2, **SPLIT)
    shutil.rmtree("artifacts/train")
    _require_close(split, train(1))


_ON_A_BASE = WORKFLOW.partition("[train.model]")[0].replace("grad_accum_steps = 4", "grad_accum_steps = 3")
_ON_A_BASE += '[train.model]\nfrom = "base"\n'


@pytest.mark.matrix
@pytest.mark.parametrize("checkpointing", ["none", "layers"])
@pytest.mark.parametrize("reduction", ["ordered", "fast"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_frozen_layers_beside_adapters_are_split_on_any_backend(
    trained_alone: Alone,
    train: Build,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    reduction: str,
    checkpointing: str,
) -> None:
    monkeypatch.setattr(conftest, "WORKFLOW", _ON_A_BASE)
    shutil.copytree(trained_alone[0] / "artifacts/train", "base")
    settings = f'{FIXED}\nmethod = "{method}"\ncheckpointing = "{checkpointing}"\n'
    whole = train(1, train=settings)
    shutil.rmtree("artifacts/train")
    faults.planned = {(1, 5): (signal.SIGKILL, "rank")}
    split = train(2, train=settings, sharding='"full"', reduction=f'"{reduction}"')
    if reduction == "ordered":
        assert split == whole
    else:
        _require_close(split, whole)


@pytest.mark.matrix
def test_a_rank_out_of_memory_in_a_split_layer_makes_all_continue_with_fewer_rows(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "WORKFLOW", _ON_A_BASE)
    shutil.copytree(trained_alone[0] / "artifacts/train", "base")
    settings = f'{FIXED}\nmethod = "lora"\n'
    fault("memory")
    split = train(2, train=settings, sharding='"full"', restarts=0)
    assert _batch_sizes() == [(0, 2, "begin"), (0, 1, "out of memory")]
    shutil.rmtree("artifacts/train")
    _require_close(split, train(1, train=settings))


_AWARE = """
[quantize]
model = "base"
data = "pretokenize"
method = "qat"
bits = 4
group_size = 32
num_steps = 6
batch_size = 2
grad_accum_steps = 3
learning_rate = 1e-3
"""


@pytest.mark.matrix
@pytest.mark.parametrize(
    "settings",
    [
        "distill = false",
        'distill = true\ncheckpointing = "layers"',
        'training = "scales"\ndistill = true',
        'training = "lora"\ndistill = true',
    ],
)
def test_quantization_aware_training_learns_with_split_layers_what_it_does_with_whole_ones(
    trained_alone: Alone, train: Build, scatters: Path, settings: str
) -> None:
    shutil.copytree(trained_alone[0] / "artifacts/train", "base")

    def quantized(distributed: str) -> list[dict[str, object]]:
        shutil.rmtree("artifacts/quantize", ignore_errors=True)
        text = WORKFLOW.partition("[train]")[0].format(distributed=distributed)
        Path("workflow.toml").write_text(text + _AWARE + settings)
        workflow = load_workflow(Path("workflow.toml"))
        run_stage(workflow, workflow.find("quantize"))
        assert not list(Path("artifacts/.mlxflow/unfinished/quantize").glob("*")), "a run that ended leaves nothing"
        return _records("train", stage="quantize") + _records("validation", stage="quantize")

    whole, split = (
        [float(str(one["loss"])) for one in quantized(distributed)]
        for distributed in ("", 'processes = 2\nsharding = "full"\nreduction = "fast"')
    )
    # a weight beside the border of two codes may be rounded to either
    np.testing.assert_allclose(split, whole, rtol=1e-4)
    assert whole[0] != whole[-1]
    assert scatters.exists() == ("lora" not in settings)


def test_an_optimizer_of_whole_matrices_is_not_sharded(train: Build) -> None:
    with pytest.raises(UserError) as caught:
        train(2, train=FIXED + '\noptimizer = "muon"\n', optimizer_sharding="true", restarts=3)
    assert str(caught.value) == (
        "optimizer_sharding = true: Muon updates whole matrices, which cannot be split between ranks. Remove it, or "
        "choose adamw or sgd as the optimizer."
    )


def test_a_fast_reduction_differs_from_the_ordered_one_by_rounding_only(trained_alone: Alone, train: Build) -> None:
    model = train(2, reduction='"fast"')
    fast = load_file("artifacts/train/model.safetensors")
    for name, ordered in load_file(trained_alone[0] / "artifacts/train/model.safetensors").items():
        # relative to the largest weight of a tensor: fp32 rounds the 8 additions of an update to 8 * 6e-8 of a gradient
        # at most, and AdamW's steps are as large for each weight
        assert np.abs(fast[name] - ordered).max() <= 1e-6 * np.abs(ordered).max(), name
    shutil.rmtree("artifacts/train")
    assert train(2, reduction='"fast"') == model


def test_a_rank_that_is_out_of_memory_makes_all_retry_with_fewer_rows(
    train: Build, fault: Callable[[str], None]
) -> None:
    fault("memory")
    train(2, train="", restarts=0)
    assert _batch_sizes() == [(0, 2, "begin"), (1, 3, "grow"), (1, 2, "out of memory")]
    assert _records("train")[-1]["step"] == 12


def _batch_sizes() -> list[tuple[object, object, object]]:
    return [(record["step"], record["batch_size"], record["reason"]) for record in _records("batch_size")]


def test_a_rank_whose_memory_runs_out_late_makes_all_continue_with_fewer_rows(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("late")
    _require_close(train(2, restarts=0), trained_alone[1])
    assert _batch_sizes() == [(0, 2, "begin"), (2, 1, "out of memory")]
    assert (
        "train: rank 1 ran out of memory at step 4 (sum of gradients); all ranks start again from the last checkpoint "
        "with fewer than 2 rows in a forward pass"
    ) in capfd.readouterr().err.splitlines()


@pytest.mark.faults
def test_memory_that_the_kernel_refuses_to_a_rank_makes_all_continue_with_fewer_rows(
    train: Build, fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's limit of the address space")
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    fault("limit")
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 46, most))  # the ranks lower it
        train(2, train="", restarts=0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
    assert _batch_sizes() == [(0, 2, "begin"), (1, 3, "grow"), (4, 2, "out of memory")]
    assert _records("train")[-1]["step"] == 12
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: rank 1")]
    assert len(said) == 1
    assert re.match(
        r"train: rank 1 ran out of memory at step [56] \(.*with fewer than 3 rows in a forward pass$", said[0]
    )


def test_a_rank_with_other_weights_ends_the_run_with_its_name(train: Build, fault: Callable[[str], None]) -> None:
    fault("weights")
    with pytest.raises(StageError) as caught:
        train(2)
    assert str(caught.value) == (
        "train: rank 1 has other weights than the other ranks after step 2. Run it again: it resumes from the last "
        "checkpoint."
    )


def test_a_rank_that_dies_while_gradients_are_added_leaves_no_wrong_checkpoint(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], tmp_path: Path
) -> None:
    fault("sum")
    assert train(2) == trained_alone[1]
    assert (tmp_path / "struck").exists()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_ranks_killed_at_random_steps_end_in_the_same_bytes(
    trained_alone: Alone, train: Build, faults: Faults, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    first, second = sorted(generator.choice(np.arange(1, 13), 2, replace=False).tolist())
    faults.planned = {
        (seed % 2, first): (signal.SIGKILL, "rank"),
        (int(generator.integers(2)), second): (signal.SIGKILL, "rank"),
    }
    assert train(2) == trained_alone[1]


@pytest.mark.faults
def test_a_rank_that_raises_is_named_and_the_run_continues(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("raises")
    assert train(2) == trained_alone[1]
    assert "train: rank 1 failed at step 2 (forward pass): ValueError: an odd number; " in capfd.readouterr().err


@pytest.mark.faults
def test_a_full_disk_of_rank_0_ends_the_run_once_and_the_next_one_continues(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], tmp_path: Path
) -> None:
    fault("disk")
    with pytest.raises(StageError, match=r"step-000004.*No space left on device"):
        train(2)
    assert (tmp_path / "struck").exists()
    assert train(2) == trained_alone[1]


@pytest.mark.faults
def test_a_file_system_without_space_ends_the_run_once_and_with_space_it_continues(
    trained_alone: Alone, train: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root: it mounts a small file system")
    unfinished = Path("artifacts/.mlxflow/unfinished")
    unfinished.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", unfinished], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with (unfinished / "filling").open("wb") as file:
            file.write(bytes(600_000))  # room for one checkpoint of 300 KB, not for the second
        with pytest.raises(StageError, match=r"^state\.safetensors: needs [\d.]+ kB, .* Make room\.$"):
            train(2)
        assert "starts again" not in capfd.readouterr().err
        (unfinished / "filling").unlink()
        assert train(2) == trained_alone[1]
        assert "train: resumes from step 2 (" in capfd.readouterr().err
    finally:
        subprocess.run(["umount", unfinished], check=True)


@pytest.mark.faults
def test_mistakes_in_a_hostfile_are_all_said_before_anything_runs(
    train: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    table = 'hosts = "hosts.json"\n'
    Path("workflow.toml").write_text(WORKFLOW.format(distributed=table, train=FIXED))
    Path("hosts.json").write_text('[{"ssh": "localhost", "ips": ["::1"]},\n {"ssh": "b", "ips": ["b"]},\n {"ips": []}]')
    done = subprocess.run(
        [sys.executable, "-m", "mlxflow", "run", "train"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        'hosts.json:2: entry 2: ips[0] = "b": expected an IP address, such as 10.0.0.2.',
        'hosts.json:3: entry 3: ssh: missing. Add the name for "ssh".',
    ]


@pytest.mark.faults
def test_a_lost_connection_starts_all_ranks_again(
    trained_alone: Alone, train: Build, fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("link")
    assert train(2) == trained_alone[1]
    assert re.search(r"^train: rank [01] lost the connection to another rank .*\[ring\]", capfd.readouterr().err, re.M)


@pytest.mark.faults
def test_two_runs_at_once_take_ports_of_their_own(trained_alone: Alone, tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(trained_alone[0], folder, ignore=shutil.ignore_patterns("train", "unfinished"))
        (folder / "workflow.toml").write_text(WORKFLOW.format(distributed="processes = 2", train=FIXED))
        runs.append(subprocess.Popen([sys.executable, "-m", "mlxflow", "run", "train"], cwd=folder))
    assert [run.wait() for run in runs] == [0, 0]
    for number in range(2):
        assert (tmp_path / str(number) / "artifacts/train/model.safetensors").read_bytes() == trained_alone[1]


def test_a_backend_that_mlx_has_not_is_named_once(train: Build, capfd: pytest.CaptureFixture[str]) -> None:
    if mx.distributed.is_available("jaccl"):
        pytest.skip("MLX has jaccl here")
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"], "rdma": rdma} for rdma in ([None, "a"], ["a", None])]
    Path("hosts.json").write_text(json.dumps(hosts))
    with pytest.raises(UserError) as caught:
        train(1, hosts='"hosts.json"', backend='"jaccl"')
    assert re.fullmatch(
        r'workflow\.distributed\.backend = "jaccl": MLX \S+ has no jaccl on \S+\. Use backend = "ring"\.',
        str(caught.value),
    )
    assert "Traceback" not in capfd.readouterr().err
