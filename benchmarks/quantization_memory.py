"""Memory and time of quantizing a model of random weights with few layers, and how both grow with their number.

`LENGTH`, `CALIBRATION` and `STEPS` in the environment set the tokens of a row, the calibration rows and the updates of
a block, `DEVICE` and `LIMIT` the device and MLX's memory limit.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finetune_folder import write_random_folder
from benchmarks.quantization_job import print_row
from benchmarks.shapes import LLAMA_8B, TINY_LLAMA

_QUARTER = LLAMA_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32_064,
}
_SHAPES = {"8b": LLAMA_8B, "quarter": _QUARTER, "tiny": TINY_LLAMA}

# Short rows by default: a CPU multiplies bf16 numbers slowly, and weights are what is measured
_LENGTH = int(os.environ.get("LENGTH", "32"))
_CALIBRATION = int(os.environ.get("CALIBRATION", "8"))
_ROWS, _VALIDATION = 40 + _CALIBRATION, 2

_TABLES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "dwq": {"method": "dwq"},
    "block": {"method": "block", "block_steps": int(os.environ.get("STEPS", "1"))},
    "rotated": {"rotations": 1},
    "budget": {"target_bits_per_weight": 4.0, "candidate_bits": [3, 4], "candidate_group_sizes": [64]},
    "block-budget": {
        "method": "block",
        "block_steps": 2,
        "target_bits_per_weight": 4.0,
        "candidate_bits": [3, 4],
        "candidate_group_sizes": [64],
    },
}


def memory(shape: str = "quarter", methods: str = ",".join(_TABLES), layers: str = "2,10") -> None:
    """Quantize models of one width with different numbers of layers, each in a process of its own.

    Args:
        shape: "8b" is that of Llama 3, "quarter" is a quarter as wide, "tiny" is for a trial.
        methods: names of `_TABLES`.
        layers: their numbers.
    """
    counts = [int(count) for count in layers.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [_written(Path(temporary) / str(count), shape, count) for count in counts]
        for method in methods.split(","):
            rows = [_measured(folder, method) for folder in folders]
            for count, row in zip(counts, rows, strict=True):
                print_row(f"{method}, {count} layers", **row)
            added = rows[-1]["dense_bytes"] - rows[0]["dense_bytes"]
            if added:
                growth = {
                    name: (rows[-1][name] - rows[0][name]) / added for name in ("peak_memory_bytes", "peak_rss_bytes")
                }
                print_row(f"{method}, growth for each byte of added weights", **growth)


def _written(folder: Path, shape: str, count: int) -> Path:
    """Return a folder with a model and its rows of tokens."""
    (folder / "model").mkdir(parents=True)
    # in a process of its own: what this one holds would count as its children's peak
    command = (
        f"from benchmarks.quantization_memory import write_model; write_model({str(folder)!r}, {shape!r}, {count})"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[1])
    ids = np.random.default_rng(0).integers(2, _SHAPES[shape]["vocab_size"], size=(_ROWS, _LENGTH))
    lines = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n" for row in ids]
    (folder / "text.jsonl").write_text("".join(lines))
    _write_workflow(folder, {})
    _run(folder, "pretokenize")
    return folder


def write_model(folder: str, shape: str, count: int) -> None:
    """Write a model of one of the shapes with some layers; see `memory`."""
    write_random_folder(_SHAPES[shape] | {"num_hidden_layers": count}, Path(folder) / "model")


def _write_workflow(folder: Path, table: dict[str, Any]) -> None:
    import tomli_w

    workflow = {
        "workflow": {
            "device": os.environ.get("DEVICE", "cpu"),
            "memory_limit": os.environ.get("LIMIT", "80%"),
            "stages": ["pretokenize", "quantize"],
        },
        "pretokenize": {
            "sources": ["text.jsonl"],
            "holdout": 0.2,
            "context_length": _LENGTH,
            "tokenizer": {"from": "model"},
        },
        "quantize": {
            "model": "model",
            "data": "pretokenize",
            "calibration_rows": _CALIBRATION,
            "max_validation_rows": _VALIDATION,
            **table,
        },
    }
    (folder / "workflow.toml").write_text(tomli_w.dumps(workflow))


def _run(folder: Path, stage: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlxflow", "run", stage], cwd=folder, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def _measured(folder: Path, method: str) -> dict[str, Any]:
    _write_workflow(folder, _TABLES[method])
    begin = time.perf_counter()
    lines = _run(folder, "quantize").splitlines()
    seconds = time.perf_counter() - begin
    report = tomllib.loads((folder / "artifacts/quantize/report.toml").read_text())
    return {
        "seconds": seconds,
        "peak_memory_bytes": report["run"]["peak_memory_bytes"],
        "peak_rss_bytes": report["run"]["peak_rss_bytes"],
        "dense_bytes": (folder / "model/model.safetensors").stat().st_size,
        "forecast": next(line.partition(" will take ")[2] for line in lines if " will take " in line),
    }
