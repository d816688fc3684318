"""Forecasts of `quantize`, of a first run in a folder and of further ones, beside what the runs took, by method."""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finetune_folder import write_random_folder
from benchmarks.quantization_job import print_row
from benchmarks.real_models import MODELS
from benchmarks.shapes import SMOLLM2_135M
from mlxflow.quantization.work_forecast import FILE
from mlxflow.quantization.work_records import read_records

_SHAPE = SMOLLM2_135M | {"vocab_size": 8192}
_ROWS, _LENGTH = 96, 128
_USUAL: dict[str, Any] = {"dtype": "fp32", "calibration_rows": 32, "max_validation_rows": 16}
_CANDIDATES = {"candidate_bits": [2, 4], "candidate_group_sizes": [64]}
_TRAINING = {"method": "qat", "num_steps": 4, "batch_size": 4}

#: Tables of `[quantize]` by a name for the row.
TABLES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "dwq": {"method": "dwq"},
    "block": {"method": "block", "block_steps": 4},
    "block, scales": {"method": "block", "block_steps": 4, "scale_steps": 4},
    "qat": _TRAINING,
    "qat, distilled": _TRAINING | {"distill": True},
    "qat, scales distilled": _TRAINING | {"distill": True, "training": "scales"},
    "rotations": {"rotations": 2},
    "budget": {"target_bits_per_weight": 3.6, **_CANDIDATES},
    "budget of gptq": {"method": "gptq", "target_bits_per_weight": 3.6, **_CANDIDATES},
    "budget of block": {"method": "block", "block_steps": 4, "target_bits_per_weight": 3.6, **_CANDIDATES},
}


# Runs a stage with the CPU time of its process as the clock, with one BLAS thread: other work does not count
_CPU_CLOCK = (
    "import time; time.perf_counter = time.process_time; "
    "import sys; sys.argv[0] = 'mlxflow'; from mlxflow.__main__ import main; raise SystemExit(main())"
)


def forecast(names: str = ";".join(TABLES), layers: str = "6", runs: str = "2", clock: str = "wall") -> None:
    """Print for each method what a run took beside its forecast, in seconds and in bytes of MLX's arrays.

    The first run of a method is predicted without records of earlier ones, each further run with those before it.

    Args:
        names: of `TABLES`, with semicolons between them.
        layers: of the model, which has SmolLM2's width; or the name of a real model, such as "smollm2".
        runs: of each method.
        clock: "wall", or "cpu" for the CPU seconds of one thread, also in the trial by which forecasts are made.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = MODELS[layers]() if layers in MODELS else _random_model(Path(temporary) / "model", int(layers))
        for name in names.split(";"):
            folder = Path(temporary) / name.replace(" ", "_")
            _prepare(folder, model, _USUAL | TABLES[name])
            for number in range(int(runs)):
                print_row(f"{name}, run {number + 1}", **_measured(folder, clock))


def _random_model(folder: Path, layers: int) -> Path:
    folder.mkdir()
    write_random_folder(_SHAPE | {"num_hidden_layers": layers}, folder)
    return folder


def _prepare(folder: Path, model: Path, table: dict[str, Any]) -> None:
    """Make a folder of its own for a method, without records of earlier runs."""
    import tomli_w

    folder.mkdir()
    ids = np.random.default_rng(0).integers(2, _SHAPE["vocab_size"], size=(_ROWS, _LENGTH))
    lines = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n" for row in ids]
    (folder / "text.jsonl").write_text("".join(lines))
    workflow = {
        "workflow": {"device": "cpu", "stages": ["pretokenize", "quantize"]},
        "pretokenize": {
            "sources": ["text.jsonl"],
            "holdout": 0.2,
            "context_length": _LENGTH,
            "tokenizer": {"from": str(model)},
        },
        "quantize": {"model": str(model), "data": "pretokenize", **table},
    }
    (folder / "workflow.toml").write_text(tomli_w.dumps(workflow))
    _run(folder, "pretokenize", "wall")


def _run(folder: Path, stage: str, clock: str) -> str:
    """Run a stage by a clock, and return what it wrote to standard error."""
    start, threads = ["-m", "mlxflow"], {}
    if clock == "cpu":
        start, threads = ["-c", _CPU_CLOCK], {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *start, "run", stage]
    environment = os.environ | threads
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def _measured(folder: Path, clock: str) -> dict[str, Any]:
    """Return the figures of a run."""
    said = next(line for line in _run(folder, "quantize", clock).splitlines() if " will take " in line)
    report = tomllib.loads((folder / "artifacts/quantize/report.toml").read_text())["run"]
    (records,) = read_records(folder / "artifacts/.mlxflow" / FILE).values()
    value, low, high = forecast_seconds(said)
    return {
        "forecast": said.partition(" will take ")[2],
        "forecast_seconds": value,
        "seconds": report["seconds"],
        "is_within": low <= round(report["seconds"]) <= high,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "seconds_over_count": records[-1].seconds,
        "memory_over_forecast": records[-1].held_bytes,
    }


def forecast_seconds(line: str) -> tuple[int, int, int]:
    """Return the likeliest seconds, and the interval, that a line of a forecast says."""
    said = line.partition(" will take ")[2]
    if said.startswith("less than 1 s"):
        return 0, 0, 1
    found = re.match(r"about (.*?) \((.*?) to (.*?)\)", said)
    if found is None:
        raise ValueError(line)
    value, low, high = (_seconds_of(words) for words in found.groups())
    return value, low, high


def _seconds_of(words: str) -> int:
    """Return the seconds of a duration in words, see `mlxflow.training.progress.duration`."""
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+) (h|min|s)", words))
