"""Forecasts of `quantize`, as the first run in a folder makes them, beside what the run then took, by method."""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finetune_folder import write_random_folder
from benchmarks.quantization_job import print_row
from benchmarks.shapes import SMOLLM2_135M
from mlxflow.quantization.work_forecast import FILE
from mlxflow.quantization.work_records import WorkRecord, read_records

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


def forecast(names: str = ";".join(TABLES), layers: str = "6") -> None:
    """Print for each method what was measured over what was forecast, in seconds and in bytes of MLX's arrays.

    Args:
        names: of `TABLES`, with semicolons between them.
        layers: of the model, which has SmolLM2's width.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        write_random_folder(_SHAPE | {"num_hidden_layers": int(layers)}, model)
        for name in names.split(";"):
            print_row(name, **_measured(Path(temporary) / name.replace(" ", "_"), model, _USUAL | TABLES[name]))


def _measured(folder: Path, model: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a method in a folder of its own, without records of earlier runs."""
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
    for stage in ("pretokenize", "quantize"):
        command = [sys.executable, "-m", "mlxflow", "run", stage]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    said = next(line for line in done.stderr.splitlines() if " will take " in line)
    report = tomllib.loads((folder / "artifacts/quantize/report.toml").read_text())["run"]
    ((record,),) = read_records(folder / "artifacts/.mlxflow" / FILE).values()
    return {"forecast": said.partition(" will take ")[2].rpartition(",")[0], **_facts(record, report)}


def _facts(record: WorkRecord, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "seconds_over_count": record.seconds,
        "memory_over_forecast": record.held_bytes,
    }
