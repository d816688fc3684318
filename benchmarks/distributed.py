"""Training on several ranks against one process, side by side with mlx-lm's own distributed trainer.

    python benchmarks/distributed.py RANKS JOB [ROUNDS [ROW...]]   such as 2 cpu; 135m and 1b need a GPU for each rank

Each rank takes the rows of one process, so the work of a rank is the same in every row but the sums. A row is started
ROUNDS times (3) in turns with the others, and printed as the median of its tokens/s over all ranks:

- alone: this project's trainer on one process;
- side by side: as many single processes at once, with no exchange: what the machine allows;
- ordered, fast: this project's ranks, by `reduction`;
- sharded: in order, each rank keeping a part of the optimizer's state;
- mlx-lm alone, mlx-lm: its trainer on one process and on the ranks.

The efficiency is the share of side by side.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package

from benchmarks.shapes import TINY_LLAMA
from benchmarks.training_ours import Variant, ours
from benchmarks.training_peers import LARGE, REFERENCE, Job, mlx_lm
from mlxflow.distributed.heartbeat import Heart
from mlxflow.distributed.launcher import Launch
from mlxflow.distributed.rank import of_this_process
from mlxflow.distributed.supervisor import RestartLimits, supervise
from mlxflow.storage.regular_files import open_log

JOBS = {"cpu": Job(TINY_LLAMA | {"hidden_size": 128, "vocab_size": 2048}, 8, 128), "135m": REFERENCE, "1b": LARGE}
ROWS = ("alone", "side by side", "ordered", "fast", "sharded", "mlx-lm alone", "mlx-lm")


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
        line = {"row": row, "ranks": 1 if row.endswith("alone") else ranks, "job": job}
        speed = statistics.median(found)
        figures = {"tokens_per_second": round(speed), "spread": [round(min(found)), round(max(found))]}
        if not row.startswith("mlx-lm"):
            names = {"alone": "times_alone", "side by side": "efficiency"}
            figures |= {names[other]: round(speed / bound, 3) for other, bound in bounds.items()}
        print(json.dumps(line | figures | {"peak_gb_a_rank": peaks[row]}), flush=True)


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
        reduction = row if row in ("ordered", "fast") else "ordered"
        backend = "ring" if job == "cpu" else "nccl"
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
            launch = Launch(command, b"", ranks, backend, reduction, row == "sharded", logs, open_log, 0, None, None)
            supervise(row, launch, RestartLimits("10 min", 600, 0))
        texts = [logs[0].read_text()]
    return [next(json.loads(line) for line in text.splitlines() if line.startswith("{")) for text in texts]


def run_row(row: str, name: str) -> None:
    """Train as one rank of a row, or as a single process."""
    from mlxflow.device import child_processes, compute_device, cpu_backend

    child_processes.end_with_parent()
    cpu_backend.fix_threads(1)
    cpu_backend.prepare()
    import mlx.core as mx

    from mlxflow.distributed import team as teams

    compute_device.select("cpu" if name == "cpu" else "gpu")
    rank = of_this_process()
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
    mlx_lm(row, job=job, dtype="float32" if name == "cpu" else "bfloat16")
    Heart(rank.beats).beat(0, "after the training", is_done=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["row", row, job]:
            run_row(row, job)
        case [ranks, job, *rest]:
            main(int(ranks), job, int(rest[0]) if rest else 3, rest[1:] or ROWS)
        case _:
            sys.exit(__doc__)
