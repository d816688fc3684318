"""Runs written by hand, with everything that a stage may report."""

import json
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from mlxflow.report.load_run import Run, read_run
from mlxflow.storage import tensor_writing
from mlxflow.storage.run_context import Member
from mlxflow.training.settings import TrainingSettings

TASKS = ("pretokenize", "train", "quantize:q4", "quantize:q8", "profile", "benchmark")
_READS = {
    "pretokenize": (),
    "train": ("pretokenize",),
    "quantize:q4": ("train",),
    "quantize:q8": ("train",),
    "profile": ("train", "pretokenize"),
    "benchmark": ("pretokenize", "train", "quantize:q4", "quantize:q8"),
}
_FURTHER = {"train": ("metrics.jsonl",), "profile": ("timeline.safetensors",)}


def members() -> list[Member]:
    """Return the stages of a hand-made run."""
    found = []
    for task in TASKS:
        folder = Path("artifacts", *task.split(":"))
        outputs = tuple(folder / name for name in ("report.toml", *_FURTHER.get(task, ())))
        found.append(Member(task, folder, _READS[task], outputs))
    return found


def read(root: Path, **how: Any) -> Run:
    """Read a hand-made run."""
    return read_run(root, members(), name=how.pop("name", "by hand"), **how)


def write_run(root: Path, *, name: str = "stage", points: int = 200) -> None:
    """Write the artifacts of a run.

    Args:
        root: the workflow's folder.
        name: stands in every field that holds a name or a text.
        points: steps of the learning curve and of the timeline.
    """
    for task in TASKS:
        folder = root / "artifacts" / Path(*task.split(":"))
        folder.mkdir(parents=True)
        report = _REPORTS[task.partition(":")[0]](name)
        about = {"settings_digest": "5" * 32, "inputs_digest": "1" * 32, "seed": "0", "mlx": "0.32"}
        report["stage"] = {"stage": task, "mlxflow": version("mlxflow")} | about
        report["run"] = _RUN | {"device": "cpu", "device_name": name, "system": name} | report.get("run", {})
        (folder / "report.toml").write_text(tomli_w.dumps(report), encoding="utf-8")
    for task in ("train", "quantize/q4", "quantize/q8"):
        (root / "artifacts" / task / "config.json").write_text('{"model_type": "llama"}')
    write_curve(root, points)
    write_timeline(root, points)
    locked = {task: {"commit": name, "device": name, "mlx": name, "seed": 0, "config": {"key": name}} for task in TASKS}
    (root / "mlxflow.lock").write_text(tomli_w.dumps(locked), encoding="utf-8")
    (root / "artifacts/report").mkdir()
    sample = {"model": "train", "model_key": f"{'5' * 32}-{'1' * 32}", "prompt": name, "text": f"{name} and on"}
    made = {"page_bytes": 1, "stage": {"stage": "report", "mlxflow": version("mlxflow")} | about, "samples": [sample]}
    made["run"] = {"seconds": 1.0, "device_name": name, "system": name, "python": "3.11", "peak_rss_bytes": 1}
    (root / "artifacts/report/report.toml").write_text(tomli_w.dumps(made), encoding="utf-8")


def edit(root: Path, task: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a report of a hand-made run."""
    path = root / "artifacts" / Path(*task.split(":")) / "report.toml"
    report = tomllib.loads(path.read_text(encoding="utf-8"))
    change(report)
    path.write_text(tomli_w.dumps(report), encoding="utf-8")


def write_curve(root: Path, points: int) -> None:
    """Write a learning curve that falls from 6 to 2 nats, a line for each step."""
    losses = 2 + 4 * np.exp(-np.arange(points) / points * 4)
    lines = []
    for step, loss in enumerate(losses.tolist()):
        told = {"tokens_per_second": 6000 + step % 7, "learning_rate": 1e-3, "gradient_norm": 1.5, "batch_size": 4}
        lines.append({"kind": "train", "step": step, "loss": loss, "peak_memory_bytes": 10**6} | told)
    lines += [
        {"kind": "validation", "step": step, "loss": losses[step] + 0.1} for step in range(0, points, points // 4)
    ]
    (root / "artifacts/train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_timeline(root: Path, points: int) -> None:
    """Write a timeline whose peak memory stands out at one step."""
    steps = np.arange(points)
    active = (2_000_000 + 1000 * (steps % 5)).astype(np.int64)
    peak = active + 500_000
    peak[points // 3] = 9_000_000
    columns: dict[str, Any] = {
        "step": steps,
        "seconds": (1.1 + steps / 10).astype(np.float32),
        "active_memory_bytes": active,
        "peak_memory_bytes": peak,
        "cache_memory_bytes": active,
    }
    columns |= {"rss_bytes": active + 10**8, "available_bytes": active + 10**10}
    columns |= {"sample_seconds": (steps / 10).astype(np.float32), "sample_rss_bytes": active + 10**8}
    columns |= {"sample_active_memory_bytes": active} | _phases(peak)
    told = {"phases": json.dumps(["load_model", "step/forward_backward", "step/update", "step"])}
    tensor_writing.write_arrays(root / "artifacts/profile/timeline.safetensors", columns, told)


def _phases(peaks: Any) -> dict[str, Any]:
    """Return a phase of loading, then steps of a tenth of a second, each with two parts, of which one has the peak."""
    steps = [
        [(1, b, b + 0.08, peak), (2, b + 0.08, b + 0.1, 2_400_000), (3, b, b + 0.1, peak)]
        for b, peak in zip((1 + np.arange(len(peaks)) / 10).tolist(), peaks.tolist(), strict=True)
    ]
    rows = [(0, 0.0, 1.0, 3_000_000), *(row for step in steps for row in step)]
    names = ("number", "begin_seconds", "end_seconds", "peak_memory_bytes")
    types = (np.int64, np.float32, np.float32, np.int64)
    columns = zip(*rows, strict=True)
    return {f"phase_{name}": np.array(column, type_) for name, type_, column in zip(names, types, columns, strict=True)}


_RUN: dict[str, Any] = {"seconds": 12.5, "python": "3.11", "peak_rss_bytes": 10**8}


def _pretokenize(name: str) -> dict[str, Any]:
    side = {"documents": 713, "tokens": 7904323, "targets": 7439032, "rows": 464966, "real_token_share": 0.999987}
    side |= {"conversations": 0, "slots": 7904424, "cut_documents": 9, "needlessly_cut": 0, "dropped": 3}
    side |= {"truncated": 0, "rows_without_targets": 4}
    kept = {"documents": 15, "tokens": 236147, "cut_documents": 0, "dropped": 0, "rows_without_targets": 0}
    lengths = {"smallest": 34, "p05": 309, "p50": 5349, "p95": 39428, "largest": 440030}
    source = {"path": name, "config": "", "split": "", "weight": 1.0, "tokens_per_document": lengths}
    source |= {"documents": 730, "duplicates": 2, "bad_records": 1, "bytes_per_token": 3.3}
    counts = ["files", "train_documents", "validation_documents", "test_documents", "tokens", "text_bytes"]
    counts += ["longer_than_a_row", "blank_documents", "masked_documents", "binary_files", "empty_files"]
    counts += ["hidden_files", "broken_links", "files_beside_records"]
    return {
        "vocab_size": 300,
        "context_length": 64,
        "packing": "best-fit",
        "warnings": [],
        "end_tokens": [name],
        "added_ends": 0,
        "conversations_with_control_tokens": 0,
        "train": side,
        "validation": side | kept,
        "duplicates": 2,
        "test_documents": 0,
        "masked_documents": 0,
        "validation_files": [],
        "test_files": [],
        "sources": [dict.fromkeys(counts, 0) | source],
        "bad_records": [name],
        "run": {"tokenized_files": 1, "kept_files": 0, "engine": name},
    }


def _train(name: str) -> dict[str, Any]:
    return {
        "parameters": 68672,
        "document_mask": False,
        "fused_loss": True,
        "kernels": [name],
        "steps": 240,
        "tokens": 10**6,
        "skipped_steps": 0,
        "first_validation_perplexity": 2079.0,
        "trained_validation_perplexity": 38.54,
        "best_validation_perplexity": 38.54,
        "best_validation_step": 240,
        "last_validation_perplexity": 38.54,
        "last_validation_perplexity_standard_error": 0.5,
        "settings": TrainingSettings().table(),
        "run": {
            "tokens_per_second": 6757.3,
            "training_seconds": 10.0,
            "compile_seconds": 0.5,
            "data_wait_seconds": 0.02,
            "device_wait_seconds": 0.1,
            "training_peak_memory_bytes": 10**7,
            "kernels_refused": [name],
        },
    }


def _quantize(name: str) -> dict[str, Any]:
    layer = {"shape": [64, 64], "mode": name, "group_size": 64, "bytes": 2560, "parameters": 4096}
    layers = [
        layer
        | {"path": f"{name} {number}", "bits": bits, "bits_per_weight": bits + 0.5, "relative_error": 0.1 / number}
        for number, bits in enumerate((4, 4, 8, 0, 4), 1)
    ]
    quality = {"perplexity": 39.11, "perplexity_standard_error": 0.5, "dense_perplexity": 38.54, "kl": 0.01}
    quality |= {"dense_perplexity_standard_error": 0.5, "top1_agreement": 0.93, "tokens": 713}
    quality |= {"perplexity_increase": 0.015, "kl_standard_error": 0.001}
    sizes = {"bits_per_weight": 4.5, "dense_bits_per_weight": 32.0, "model_bytes": 49144, "parameters": 87000}
    sizes |= {"compression_ratio_fp32": 7.1, "compression_ratio_bf16": 3.55, "bits": 4, "group_size": 64}
    paths = {"quantized_layers": [name], "dense_layers": [name]}
    return {"method": name, "mode": name, "layers_toml": name, "layers": layers, "quality": quality} | sizes | paths


def _profile(name: str) -> dict[str, Any]:
    made = {f"{part}_bytes": 10**6 for part in ("gradients", "optimizer", "activations", "logits", "data")}
    made |= {"weights_bytes": 4 * 10**6, "update_bytes": 0}
    phase = {"name": name, "calls": 20, "seconds": 1.5, "peak_memory_bytes": 9 * 10**6, "growth_bytes": 0}
    readings = ("active_memory", "cache_memory", "rss_before", "rss", "footprint", "available", "device", "model")
    trends = ("active_memory", "peak_memory", "cache_memory", "rss", "available")
    verdict = {"verdict": "none", "bytes_per_step": 0.0, "note": name}
    return {f"{reading}_bytes": 10**6 for reading in readings} | {
        "batch_size": 4,
        "num_steps": 20,
        "settings": TrainingSettings().table(),
        "median_step_seconds": 0.075,
        "peak_memory_bytes": 9_000_000,
        "phases": [phase],
        "memory_limit_bytes": 3 * 10**9,
        "cache_limit_bytes": 2 * 10**9,
        "composition": made | {"cache_bytes": 2 * 10**6, "other_bytes": 10**6, "total_bytes": 12 * 10**6},
        "leak": {"verdict": "none", "bytes_per_step": 0.0, "reserved": verdict, "process": verdict},
        "trend": {f"{reading}_bytes_per_step": 0.0 for reading in trends},
        "peaks": [{"bytes": 9_000_000, "step": 66, "phase": name}],
        "suggestions": [{"key": name, "value": name, "saves_bytes": 10**6, "evidence": name}],
        "run": {"mlx_device_info": {"device_name": name}},
    }


def training_row(name: str, speed: float) -> dict[str, Any]:
    """Return a row of a benchmark at a speed in tokens per second."""
    ends = {"low_tokens_per_second": speed - 200, "high_tokens_per_second": speed + 200}
    step = {"median_step_seconds": 0.1, "low_step_seconds": 0.09, "high_step_seconds": 0.11, "num_steps": 20}
    shares = {"data_wait_share": 0.01, "compile_seconds": 0.5, "samples_per_second": 160.0}
    return (
        {"name": name, "batch_size": 16, "tokens_per_second": speed, "peak_memory_bytes": 10**7} | ends | step | shares
    )


def _benchmark(name: str) -> dict[str, Any]:
    curve = {"steps": [1, 2, 3], "tokens": [10, 20, 30], "seconds": [1.0, 2.0, 3.0], "loss": [3.0, 2.5, 2.2]}
    curve |= {"same_loss": 2.2, "tokens_to_loss": 30, "seconds_to_loss": 3.0}
    model = {
        "model_bytes": 49144,
        "compression_ratio": 5.6,
        "compression_ratio_fp32": 7.1,
        "decode_tokens_per_second": 410.0,
        "low_decode_tokens_per_second": 400.0,
        "high_decode_tokens_per_second": 420.0,
        "perplexity": 39.1,
        "perplexity_standard_error": 0.0,
    }
    rate = {"tokens_per_second": 9000.0, "low_tokens_per_second": 8000.0, "high_tokens_per_second": 9500.0}
    return {
        "version": 6,
        "device": {"kind": "cpu", "name": name, "processor": name},
        "training": [training_row("baseline", 4000.0), training_row("workflow", 8000.0), training_row(name, 7000.0)],
        "models": [model | {"model": name, "prefill": [rate | {"prompt_tokens": 64}]}],
        "convergence": [curve | {"name": name}],
        "bottleneck": {"data_share": 0.01, "graph_share": 0.1, "compute_share": 0.8, "synchronize_share": 0.09}
        | {"flops_per_second": 1e10, "ceiling_flops_per_second": 4e10, "advice": name},
        "drift": {"name": name, "batch_size": 16, "ratio": 1.02, "is_noticed": False},
        "promises": {"data_wait": {"promise": name, "measured": 0.01, "holds": True, "figure": name}},
    }


_REPORTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "pretokenize": _pretokenize,
    "train": _train,
    "quantize": _quantize,
    "profile": _profile,
    "benchmark": _benchmark,
}
