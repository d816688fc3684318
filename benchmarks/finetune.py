"""Fine-tuning against its peers: tokens a second, peak memory, first losses; each row in a process of its own.

    python benchmarks/finetune.py JOB [ROW ...]     rows of a job, in turn; all of them by default
    python benchmarks/finetune.py rows              their names
    python benchmarks/finetune.py parts [ROWS ...]  the parts of a step of the 8b job, each alone
    python benchmarks/finetune.py forecast [NAME ...]
                                                    what `mlxflow fit` predicts of small jobs, beside what they take:
                                                    pairs of peak memory, seconds of a step, and seconds to the end
    TINY=1 python benchmarks/finetune.py ...        the same in a tiny shape, to try the script on any device

| job | |
| --- | --- |
| cpu | SmolLM2-135M-Instruct in 4 bits, LoRA, 2 x 64 tokens a step; ours in fp32 |
| 1gb | four layers of the 8b model, 1 GB: what a folder takes to be opened, and the seconds to the first step |
| 8b | random weights of 4 bits in the shape of Llama 3 8B, LoRA of rank 8 on every linear layer, 4 x 2,048 tokens |
| cpu-padded, 8b-padded | the same as cpu and 8b with rows that end early: 31 tokens of 256, 512 of 2,048 |
| 8b-8k, 8b-32k | the same with one row of 8,192 or 32,768 tokens |
| 8b-dora | the same as 8b with DoRA |
| 1b-full | a dense model of 1.2 billion parameters, all trained, 4 x 2,048 tokens |

Every step trains on the same rows, so that losses of all rows can be compared. Peaks are MLX's (or PyTorch's) counter,
which mlx-lm's command reports to its callback, and the process's own memory. Prints one line of JSON a row; of ours it
names the kernels that were used, and under "refused" the others, each with the reason.
`FINETUNE_FOLDER` names where model folders are kept; a temporary folder by default.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package
from benchmarks import finetune_forecast, finetune_parts, finetune_rows
from benchmarks.finetune_folder import JOBS, make, smollm2_folder
from benchmarks.processes import let_children_import_checkout
from mlxflow.device import cpu_backend

Row = Callable[..., None]


def _recomputed(limit_gb: float, checkpointing: str = "layers") -> Row:
    return partial(finetune_rows.ours, checkpointing=checkpointing, limit_gb=limit_gb)


ROWS: dict[str, Row] = {
    "mlxflow, layers recomputed": _recomputed(0),
    "mlx-lm lora --grad-checkpoint": partial(finetune_rows.mlx_lm, recomputes=True),
    "mlxflow, nothing recomputed": finetune_rows.ours,
    "mlxflow, recomputation chosen": partial(finetune_rows.ours, checkpointing="auto"),
    "mlx-lm lora": partial(finetune_rows.mlx_lm, recomputes=False),
    **{f"mlxflow, layers recomputed, limit {limit} GB": _recomputed(limit) for limit in (8, 9, 16)},
    **{f"mlxflow, pairs recomputed, limit {limit} GB": _recomputed(limit, "pairs") for limit in (8, 9, 16)},
    "PyTorch, dense LoRA, layers recomputed": partial(finetune_rows.torch_lora, recomputes=True),
    "PyTorch, dense LoRA": partial(finetune_rows.torch_lora, recomputes=False),
}


def _run(job: str, names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"no row {unknown[0]!r}; `python benchmarks/finetune.py rows` lists them")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(os.environ.get("FINETUNE_FOLDER", scratch)) / _folder_name(job)
        subprocess.run([sys.executable, __file__, "make", job, str(folder)], check=True)
        for name in names or _usual(job):
            _run_row(name, [sys.executable, __file__, "row", job, name, str(folder)])


def _run_row(name: str, command: Sequence[str]) -> None:
    """Print the line of a row; where there is none, the end of what its process printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"row"')]
    end = (done.stdout + done.stderr)[-1500:]
    print("\n".join(lines) if lines else json.dumps({"row": name, "failed": done.returncode, "end": end}), flush=True)


def _forecast(names: Sequence[str]) -> None:
    """Print the lines of `finetune_forecast`; the model folders of its jobs are made where they are missing."""
    if unknown := [name for name in names if name not in finetune_forecast.JOBS]:
        sys.exit(f"no job {unknown[0]!r}. Known: {', '.join(finetune_forecast.JOBS)}")
    needed = {finetune_forecast.JOBS[name].model for name in names or finetune_forecast.usual()}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(os.environ.get("FINETUNE_FOLDER", scratch))
        for job in needed & JOBS.keys():
            subprocess.run([sys.executable, __file__, "make", job, str(place / job)], check=True)
        folders = {job: place / job / "model" for job in needed & JOBS.keys()}
        dense = {"dense": smollm2_folder()} if "dense" in needed else {}
        finetune_forecast.main(list(names), dense | folders)


def _folder_name(job: str) -> str:
    """Return the folder of a job's model; jobs of one model share it, their texts are written anew."""
    return job.split("-")[0]


def _usual(job: str) -> list[str]:
    """Return the rows that a job runs by default: those without a limit, and PyTorch's where it has a GPU."""
    return [name for name in ROWS if "limit" not in name and not (name.startswith("PyTorch") and job.startswith("cpu"))]


def _main() -> None:
    match sys.argv[1:]:
        case ["make", job, folder]:
            make(job, Path(folder))
        case ["row", job, name, folder]:
            ROWS[name](name, JOBS[job], Path(folder))
        case ["rows"]:
            print("\n".join(ROWS))
        case ["forecast", *jobs]:
            _forecast(jobs)
        case ["parts", *rows]:
            finetune_parts.main([int(number) for number in rows])
        case [job, *names] if job in JOBS:
            _run(job, names)
        case _:
            print(__doc__)


if __name__ == "__main__":
    let_children_import_checkout()
    cpu_backend.prepare()
    _main()
