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
from typing import Any

import numpy as np
import tomli_w

#: The jobs: the model's folder of `benchmarks/finetune.py`, and the keys of `[train]`.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits, LoRA": ("cpu", {"method": "lora"}),
    "4 bits, LoRA, layers recomputed": ("cpu", {"method": "lora", "checkpointing": "layers"}),
    "dense, LoRA": ("dense", {"method": "lora"}),
    "dense, all weights": ("dense", {"method": "full"}),
    "dense, all weights, layers recomputed": ("dense", {"method": "full", "checkpointing": "layers"}),
    "1gb, LoRA": ("1gb", {"method": "lora", "batch_size": 1}),
    "1gb, LoRA, bf16": ("1gb", {"method": "lora", "batch_size": 1, "precision": "bf16"}),
}
_STEPS, _LENGTH, _LINES = int(os.environ.get("STEPS", "20")), 64, 200


def main(names: list[str], folder_of: dict[str, Path]) -> None:
    """Print a line of JSON for each job.

    Args:
        names: of the jobs; empty for all.
        folder_of: the model folders by name.
    """
    for name in names or JOBS:
        model, table = JOBS[name]
        with tempfile.TemporaryDirectory() as scratch:
            _compare(name, Path(scratch), folder_of[model], table)


def _compare(name: str, project: Path, model: Path, table: dict[str, Any]) -> None:
    _write(project, model, table)
    _run(project, "run", "pretokenize")
    predicted = _run(project, "fit", "train").stdout
    begin = time.perf_counter()
    said = _run(project, "run", "train").stderr
    seconds = time.perf_counter() - begin - _waited_seconds(said)
    run = tomllib.loads((project / "artifacts/train/report.toml").read_text())["run"]
    found = re.search(
        r"([\d,.]+) MB in a pass.*?about ([\d,.]+) seconds to the end: .* ([\d,.]+) a step", predicted, re.DOTALL
    )
    assert found, predicted
    memory, to_end, of_step = (float(number.replace(",", "")) for number in found.groups())
    steady = (run["training_seconds"] - run["compile_seconds"]) / (_STEPS - 1)
    row = {
        "job": name,
        "peak_gb": [round(memory / 1e3, 3), round(run["training_peak_memory_bytes"] / 1e9, 3)],
        "step_seconds": [of_step, round(steady, 2)],
        "seconds": [to_end, round(seconds, 1)],
    }
    ratios = {f"{key}_ratio": round(pair[0] / pair[1], 2) for key, pair in row.items() if isinstance(pair, list)}
    print(json.dumps(row | ratios), flush=True)


def _write(project: Path, model: Path, table: dict[str, Any]) -> None:
    words = list(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"])
    plain = [word for word in words if word.isalnum() and word.isascii()]
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(plain, _LENGTH)) for _ in range(_LINES)]
    (project / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tables = {
        "workflow": {"device": "cpu", "stages": ["pretokenize", "train"]},
        "pretokenize": {
            "sources": ["text.jsonl"],
            "context_length": _LENGTH,
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
            **table,
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
