"""What `mlxflow fit` predicts of fine-tuning jobs, beside what the training then takes: peak memory and seconds."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w


class Job(NamedTuple):
    """A training whose forecast is compared.

    Attributes:
        model: the name of its folder: "dense", or a job of `benchmarks/finetune.py`.
        table: keys of `[train]`.
        device: as `[workflow]` has it.
        length: tokens of a row.
        lines: of the text, a row each.
        limit_gb: memory limit; 0 for the device's own.
    """

    model: str
    table: dict[str, Any]
    device: str = "cpu"
    length: int = 64
    lines: int = 200
    limit_gb: int = 0


_ON_GPU: dict[str, Any] = {"device": "gpu", "length": 2048}
_LARGE = {"method": "lora", "batch_size": 4, "precision": "bf16"}
_LONG = _LARGE | {"batch_size": 1, "checkpointing": "pairs", "max_validation_rows": 2}

JOBS = {
    "4 bits, LoRA": Job("cpu", {"method": "lora"}),
    "4 bits, LoRA, layers recomputed": Job("cpu", {"method": "lora", "checkpointing": "layers"}),
    "dense, LoRA": Job("dense", {"method": "lora"}),
    "dense, all weights": Job("dense", {"method": "full"}),
    "dense, all weights, layers recomputed": Job("dense", {"method": "full", "checkpointing": "layers"}),
    "1gb, LoRA": Job("1gb", {"method": "lora", "batch_size": 1}),
    "1gb, LoRA, bf16": Job("1gb", {"method": "lora", "batch_size": 1, "precision": "bf16"}),
    "8b, LoRA": Job("8b", _LARGE, **_ON_GPU),
    "8b, LoRA, layers recomputed": Job("8b", _LARGE | {"checkpointing": "layers"}, **_ON_GPU),
    "8b, LoRA, pairs recomputed": Job("8b", _LARGE | {"checkpointing": "pairs"}, **_ON_GPU),
    "8b, DoRA, layers recomputed": Job("8b", _LARGE | {"method": "dora", "checkpointing": "layers"}, **_ON_GPU),
    "8b, LoRA, layers recomputed, limit 9 GB": Job("8b", _LARGE | {"checkpointing": "layers"}, **_ON_GPU, limit_gb=9),
    "8b, LoRA, a row of 8,192, pairs, limit 8 GB": Job("8b", _LONG, "gpu", 8192, 40, 8),
    "8b, LoRA, a row of 32,768, pairs, limit 16 GB": Job("8b", _LONG, "gpu", 32_768, 20, 16),
    "1b-full, layers recomputed": Job(
        "1b-full",
        {"method": "full", "batch_size": 4, "precision": "bf16-pure", "checkpointing": "layers"},
        **_ON_GPU,
    ),
}
_UNITS = {"MB": 1e-3, "GB": 1.0}
_STEPS = int(os.environ.get("STEPS", "20"))


def main(names: list[str], folder_of: dict[str, Path]) -> None:
    """Print a line of JSON for each job.

    Args:
        names: of the jobs; empty for those of a CPU.
        folder_of: the model folders by name.
    """
    for name in names or usual():
        with tempfile.TemporaryDirectory() as scratch:
            _compare(name, Path(scratch), folder_of[JOBS[name].model])


def usual() -> list[str]:
    """Return the jobs that are run by default: those of a CPU."""
    return [name for name, job in JOBS.items() if job.device == "cpu"]


def _compare(name: str, project: Path, model: Path) -> None:
    _write(project, model, JOBS[name])
    _run(project, "run", "pretokenize")
    predicted = _run(project, "fit", "train").stdout
    begin = time.perf_counter()
    said = _run(project, "run", "train").stderr
    seconds = time.perf_counter() - begin - _waited_seconds(said)
    run = tomllib.loads((project / "artifacts/train/report.toml").read_text())["run"]
    memory, unit, to_end, start, opening, choosing, first, of_step, of_validation, validations, writing = _parts(
        predicted
    )
    steady = (run["training_seconds"] - run["compile_seconds"]) / (_STEPS - 1)
    row: dict[str, Any] = {
        "job": name,
        "peak_gb": [
            round(min(memory * _UNITS[unit], JOBS[name].limit_gb or np.inf), 3),
            round(run["training_peak_memory_bytes"] / 1e9, 3),
        ],
        "step_seconds": [of_step, round(steady, 2)],
        "first_step_seconds": [round(first + of_step, 1), round(run["compile_seconds"], 1)],
        "steps_seconds": [round(first + of_step * _STEPS, 1), round(run["training_seconds"], 1)],
        "outside_the_stage_seconds": [start, round(seconds - run["seconds"], 1)],
        "rest_seconds": [
            round(2 * opening + choosing + of_validation * validations + writing, 1),
            round(run["seconds"] - run["training_seconds"], 1),
        ],
        "seconds": [to_end, round(seconds, 1)],
    }
    compared = ("peak_gb", "step_seconds", "seconds")
    ratios = {f"{key}_ratio": round(row[key][0] / row[key][1], 2) for key in compared}
    print(json.dumps(row | ratios), flush=True)


def _parts(predicted: str) -> tuple[Any, ...]:
    """Return what `fit` printed: a peak and its unit, the seconds to the end, and those of its parts."""
    found = re.search(
        r"([\d,.]+) (MB|GB) in a pass.*?about ([\d,.]+) seconds to the end: ([\d,.]+) to start, ([\d,.]+) to open .*?, "
        r"([\d,.]+) to choose .*?, ([\d,.]+) more for the first step, ([\d,.]+) a step, ([\d,.]+) each of (\d+) "
        r"validations, ([\d,.]+) to write",
        predicted,
        re.DOTALL,
    )
    assert found, predicted
    return tuple(text if text in _UNITS else float(text.replace(",", "")) for text in found.groups())


def _write(project: Path, model: Path, job: Job) -> None:
    words = list(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"])
    plain = [word for word in words if word.isalnum() and word.isascii()]
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(plain, job.length)) for _ in range(job.lines)]
    (project / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tables = {
        "workflow": {
            "device": job.device,
            "stages": ["pretokenize", "train"],
            **({"memory_limit": f"{job.limit_gb} GB"} if job.limit_gb else {}),
        },
        "pretokenize": {
            "sources": ["text.jsonl"],
            "context_length": job.length,
            "holdout": 0.1,
            "tokenizer": {"from": str(model)},
        },
        "train": {
            "model": {"from": str(model)},
            "num_steps": _STEPS,
            "batch_size": 2,
            "dynamic_batch_size": False,
            "max_validation_rows": 8,
            "save_every": 0,
            **job.table,
        },
    }
    (project / "workflow.toml").write_text(tomli_w.dumps(tables))


def _waited_seconds(said: str) -> float:
    """Return how long a run waited for other processes to leave the device."""
    return sum(float(number.replace(",", "")) for number in re.findall(r"^train: waited ([\d,]+) s$", said, re.M))


def _run(project: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mlxflow", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done
