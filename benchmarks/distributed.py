"""Training on several ranks against one process, side by side with mlx-lm's own distributed trainer.

    python benchmarks/distributed.py RANKS JOB [ROUNDS [ROW...]]   such as 2 cpu; 135m and 1b need a GPU for each rank
    python benchmarks/distributed.py link MILLISECONDS MBIT_PER_SECOND [ROUNDS]   two ranks, cpu, a slow link; root

Each rank takes the rows of one process, so the work of a rank is the same in every row but the sums. A row is started
ROUNDS times (3) in turns with the others, and printed as the median of its tokens/s over all ranks:

- alone: this project's trainer on one process;
- side by side: as many single processes at once, with no exchange: what the machine allows;
- ordered, fast: this project's ranks, by `reduction`;
- sharded, fast sharded: each rank keeping a part of the optimizer's state, in order and with the backend's sum;
- fast split: `sharding = "full"`, each rank keeping a part of the layers; not on the CPU, where no backend scatters;
- mlx-lm alone, mlx-lm: its trainer on one process and on the ranks.

The efficiency is the share of side by side, and the overhead of a step what it takes longer than there.

Over a link (`slow_link`), the wire's own time is that in which two programs send each other the bytes of an update's
gradients over one TCP connection. The bound is the speed of steps that take the time of side by side and then of the
wire, because a CPU's gradients leave when all are known.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package

from benchmarks import slow_link
from benchmarks.processes import let_children_import_checkout
from benchmarks.shapes import TINY_LLAMA
from benchmarks.training_ours import Variant, ours
from benchmarks.training_peers import LARGE, REFERENCE, Job, mlx_lm
from mlxflow.distributed.heartbeat import Heart
from mlxflow.distributed.launcher import Launch
from mlxflow.distributed.rank import Rank, of_this_process
from mlxflow.distributed.supervisor import RestartLimits, supervise
from mlxflow.storage.regular_files import open_log

JOBS = {"cpu": Job(TINY_LLAMA | {"hidden_size": 128, "vocab_size": 2048}, 8, 128), "135m": REFERENCE, "1b": LARGE}
_NAMESPACES = "BENCHMARK_NAMESPACES"
ROWS = ("alone", "side by side", "ordered", "fast", "sharded", "fast sharded", "fast split", "mlx-lm alone", "mlx-lm")


def main(ranks: int, job: str, rounds: int, rows: Sequence[str]) -> None:
    """Start rows in turns and print a line of JSON for each."""
    speeds: dict[str, list[float]] = {row: [] for row in rows}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for row in rows:
                printed = _start(row, ranks, job, Path(folder))
                speeds[row].append(sum(one["tokens_per_second"] for one in printed))
                peaks[row] = max(one["peak_gb"] for one in printed)
    bounds = {row: statistics.median(speeds[row]) for row in ("side by side", "alone") if row in speeds}
    for row, found in speeds.items():
        count = 1 if row.endswith("alone") else ranks
        line = {"row": row, "ranks": count, "job": job}
        speed = statistics.median(found)
        figures = {"tokens_per_second": round(speed), "spread": [round(min(found)), round(max(found))]}
        if not row.startswith("mlx-lm"):
            names = {"alone": "times_alone", "side by side": "efficiency"}
            figures |= {names[other]: round(speed / bound, 3) for other, bound in bounds.items()}
            alone = ranks / bounds["side by side"] if count > 1 and "side by side" in bounds else 0.0
            figures |= _step(JOBS[job], count / speed, alone)
        print(json.dumps(line | figures | {"peak_gb_a_rank": peaks[row]}), flush=True)


def _step(job: Job, seconds: float, alone: float) -> dict[str, float]:
    """Return the time of a step, and what it takes longer than side by side, if that was measured.

    Args:
        job: of each rank.
        seconds: of a token of a rank.
        alone: the same side by side; 0 if it was not measured.
    """
    step_ms, alone_ms = 1000 * job.tokens * seconds, 1000 * job.tokens * alone
    return {"step_ms": round(step_ms, 2)} | ({"overhead_ms": round(step_ms - alone_ms, 2)} if alone else {})


def over_link(milliseconds: float, mbit_per_second: float, rounds: int) -> None:
    """Train on two ranks over a slow link and over loopback in turns, and print a line of JSON for each."""
    rows = ("side by side", "ordered", "fast", "ordered over the link", "fast over the link")
    speeds: dict[str, list[float]] = {row: [] for row in rows}
    wire: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        slow_link.linked(milliseconds / 1000, mbit_per_second * 1e6) as link,
    ):
        num_bytes = 4 * _num_parameters("cpu")
        for _ in range(rounds):
            wire.append(slow_link.exchange_seconds(link, num_bytes))
            for row in rows:
                with _namespaces(link if row.endswith("link") else None):
                    printed = _start(row, 2, "cpu", Path(folder))
                speeds[row].append(sum(one["tokens_per_second"] for one in printed))
    tokens, wire_seconds = 2 * JOBS["cpu"].batch * JOBS["cpu"].length, statistics.median(wire)
    medians = {row: statistics.median(found) for row, found in speeds.items()}
    bound = tokens / (tokens / medians["side by side"] + wire_seconds)
    for row, speed in medians.items():
        figures = {"tokens_per_second": round(speed), "spread": [round(min(speeds[row])), round(max(speeds[row]))]}
        line = {"row": row, "ranks": 2, "job": "cpu", **figures, "step_ms": round(1000 * tokens / speed, 1)}
        if row.endswith("link"):
            line |= {"delay_ms": milliseconds, "mbit_per_second": mbit_per_second, "bytes": num_bytes}
            line |= {
                "wire_ms": round(1000 * wire_seconds, 1),
                "bound": round(bound),
                "of_bound": round(speed / bound, 3),
            }
        print(json.dumps(line), flush=True)


def _num_parameters(job: str) -> int:
    from mlx.utils import tree_flatten

    from benchmarks.training_peers import build_model

    model = build_model(JOBS[job], "float32")
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


@contextlib.contextmanager
def _namespaces(link: "slow_link.Link | None") -> Iterator[None]:
    """Let the ranks that are started in the block run at the two ends of a link."""
    if link is not None:
        os.environ[_NAMESPACES] = " ".join(link.namespaces)
    try:
        yield
    finally:
        os.environ.pop(_NAMESPACES, None)


def _enter_link(rank: Rank) -> None:
    """Move this rank to its end of a link, and let MLX use the addresses there."""
    names = os.environ.get(_NAMESPACES)
    if names:
        slow_link.enter(names.split()[rank.number])
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump([[f"{address}:7100"] for address in slow_link.ADDRESSES], file)
        os.environ["MLX_HOSTFILE"] = file.name


def _start(row: str, ranks: int, job: str, folder: Path) -> list[dict[str, Any]]:
    """Run a row and return what its ranks print: rank 0 for all, or each process for itself."""
    command = [sys.executable, __file__, "row", row, job]
    if row.endswith("alone") or row == "side by side":
        count = ranks if row == "side by side" else 1
        started = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(number)},
            )
            for number in range(count)
        ]
        texts = [process.communicate()[0].decode() for process in started]
        assert not any(process.returncode for process in started), row
    else:
        logs = [folder / f"{number}.log" for number in range(ranks)]
        reduction = "fast" if row.startswith("fast") else "ordered"
        backend = "ring" if job == "cpu" else "nccl"
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
            shards = row.endswith("sharded"), row.endswith("split")
            launch = Launch(command, b"", ranks, backend, reduction, *shards, logs, open_log, 0, None, None)
            supervise(row, launch, RestartLimits("10 min", 600, 0))
        texts = [logs[0].read_text()]
    return [next(json.loads(line) for line in text.splitlines() if line.startswith("{")) for text in texts]


def run_row(row: str, name: str) -> None:
    """Train as one rank of a row, or as a single process."""
    from mlxflow.device import child_processes, compute_device, cpu_backend

    rank = of_this_process()
    _enter_link(rank)
    child_processes.end_with_parent()
    cpu_backend.fix_threads(1)
    cpu_backend.prepare()
    import mlx.core as mx

    from mlxflow.distributed import team as teams

    compute_device.select("cpu" if name == "cpu" else "gpu")
    job = JOBS[name]._replace(batch=JOBS[name].batch * rank.size)
    if not rank.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not row.startswith("mlx-lm"):
        ours(
            row,
            Variant("fp32" if name == "cpu" else "bf16-pure", grad_accum_steps=rank.size),
            job=job,
            team=teams.of_this_process(),
        )
        return
    if rank.size > 1:
        mx.distributed.init(strict=True, backend=rank.backend)
    if rank.backend == "nccl":
        _sum_reports_on_the_device()
    mlx_lm(row, job=job, dtype="float32" if name == "cpu" else "bfloat16")
    Heart(rank.beats).beat(0, "after the training", is_done=True)


def _sum_reports_on_the_device() -> None:
    """Let mlx-lm add the figures of its reports over the ranks on the GPU.

    Its trainer does so on a stream of the CPU (`all_sum(losses, stream=mx.cpu)`), where MLX 0.32.4's NCCL backend then
    looks for the GPU's stream in a thread that has none: "There is no Stream(gpu, 0) in current thread".
    """
    import mlx.core as mx

    on_any_stream = mx.distributed.all_sum

    def all_sum(x: "mx.array", *, group: Any = None, stream: Any = None) -> "mx.array":
        is_cpu = isinstance(stream, mx.DeviceType) and stream == mx.cpu  # comparing it with None raises
        return on_any_stream(x, group=group, stream=None if is_cpu else stream)

    mx.distributed.all_sum = all_sum


if __name__ == "__main__":
    let_children_import_checkout()
    match sys.argv[1:]:
        case ["row", row, job]:
            run_row(row, job)
        case ["link", milliseconds, mbit_per_second, *rest]:
            over_link(float(milliseconds), float(mbit_per_second), int(rest[0]) if rest else 3)
        case [ranks, job, *rest]:
            main(
                int(ranks),
                job,
                int(rest[0]) if rest else 3,
                rest[1:] or [row for row in ROWS if job != "cpu" or row != "fast split"],
            )
        case _:
            sys.exit(__doc__)
