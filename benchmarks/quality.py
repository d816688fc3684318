"""Quality of quantized real models: every method beside mlx-lm's, on one calibration text, judged on another one.

`python -m benchmarks.quality run smollm2 --folder DIR` quantizes by the stage `quantize`, each variant in a process of
its own, and appends a line of JSON for each to DIR/results.jsonl: stored bits of a weight from the file, perplexity and
divergence from the dense model with standard errors over documents, seconds and resident memory. Variants that have a
line are left out, so a run can be continued. `python -m benchmarks.quality table DIR/results.jsonl` prints the table.

GPTQ, AWQ and DWQ use mlx-lm's functions (of AWQ, its search); `dynamic` is mlx-lm's dynamic_quant between one bit less
and one bit more, with the threshold that gives the size of the width. All of them, and rounding, quantize embedding and
head with the same bits as the rest. `e2e` is `block` with scales trained together afterwards.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx
import tomli_w

from benchmarks.real_models import MODELS, sense_of
from benchmarks.real_texts import texts
from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.dense_reference import cached_reference
from mlxflow.evaluation.kl_divergence import compare_positions
from mlxflow.models import model_folder, quantized_layers
from mlxflow.quantization.calibrated import choose_rows
from mlxflow.quantization.settings import BITS
from mlxflow.storage.digests import digest_json

#: Keys of the `[quantize]` table by name of a method.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "dwq": {"method": "dwq"},
    "dynamic": {},
    "block": {"method": "block"},
    "e2e": {"method": "block"},
    "rotated": {"method": "block", "rotations": 4},
    "scales": {"method": "qat", "training": "scales", "distill": True},
    "all": {"method": "qat", "training": "full", "distill": True},
}

# Methods that start from the codes of "block"
_STARTS = ("scales", "all")
MLX_LM = ("gptq", "awq", "dwq", "dynamic")

# mlx-lm's GPTQ has no 3 bits
_GPTQ_BITS = (2, 4)

_FEWEST_TARGETS = 32


def main() -> None:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="quantize and judge")
    run.add_argument("model", help="smollm2, gemma3, or a model folder")
    run.add_argument("--folder", type=Path, required=True, help="for artifacts and results")
    run.add_argument("--widths", default="4,3,2")
    run.add_argument("--group-size", type=int, default=64)
    run.add_argument("--methods", default=",".join(METHODS))
    run.add_argument("--seeds", default="0")
    run.add_argument("--context-length", type=int, default=256)
    run.add_argument("--calibration-rows", type=int, default=128)
    run.add_argument("--block-steps", type=int, default=100)
    run.add_argument("--scale-steps", type=int, default=100, help="of e2e, scales and all")
    run.add_argument("--batch-size", type=int, default=8, help="of scales and all")
    run.add_argument("--documents", type=int, default=100, help="news articles that judge")
    run.add_argument("--device", default="auto")
    run.add_argument("--write", type=int, default=0, metavar="TOKENS", help="of a sample that each model writes")
    table = verbs.add_parser("table", help="print the table of results")
    table.add_argument("results", type=Path)
    parsed = parser.parse_args()
    if parsed.verb == "table":
        print("\n".join(table_of([json.loads(line) for line in parsed.results.read_text().splitlines()])))
    else:
        _run(parsed)


def _run(parsed: argparse.Namespace) -> None:
    if parsed.device != "auto":
        mx.set_default_device(getattr(mx, parsed.device))
    dense = MODELS[parsed.model]() if parsed.model in MODELS else Path(parsed.model)
    folder: Path = parsed.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    known = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    judge = None
    for seed in parsed.seeds.split(","):
        job = folder / f"seed{seed}"
        job.mkdir(exist_ok=True)
        _write_workflow(job, parsed, dense, seed, [])
        if not (job / "artifacts/pretokenize").exists():
            _command(job, "pretokenize")
        for bits, method in _variants(parsed):
            name = f"{method}_w{bits}g{parsed.group_size}"
            whole = f"{parsed.model} {name} seed {seed}"
            if whole in known:
                continue
            judge = judge or Judge(dense, job, folder / "cache", documents=parsed.documents)
            begin = time.perf_counter()
            table = _table(parsed, dense, method, bits)
            if method == "dynamic":
                table["layers"] = _dynamic_rules(parsed, dense, job, bits)
            tables = [{"name": name, **table}]
            if method in _STARTS:
                tables.insert(0, {"name": f"start_w{bits}", **_table(parsed, dense, "block", bits)})
            _write_workflow(job, parsed, dense, seed, tables)
            for one in tables:
                _command(job, f"quantize:{one['name']}")
            seconds = time.perf_counter() - begin
            artifact = job / "artifacts/quantize" / name
            line = {
                "name": whole,
                "model": parsed.model,
                "method": method,
                "bits": bits,
                "group_size": parsed.group_size,
                "seed": int(seed),
                "device": str(mx.default_device()),
                "seconds": round(seconds, 1),
                **_report_facts(artifact),
                **judge.figures(artifact),
            }
            if parsed.write:
                line["text"] = sense_of(artifact, num_tokens=parsed.write).text
            with results.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def _variants(parsed: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Yield width and method of every variant that mlx-lm and this project have."""
    for bits in map(int, parsed.widths.split(",")):
        for method in parsed.methods.split(","):
            if (method != "gptq" or bits in _GPTQ_BITS) and (method != "dynamic" or bits - 1 in BITS["affine"]):
                yield bits, method


def _table(parsed: argparse.Namespace, dense: Path, method: str, bits: int) -> dict[str, Any]:
    """Return the `[quantize]` table of a variant."""
    table: dict[str, Any] = {
        "model": str(dense),
        "data": "pretokenize",
        "bits": bits,
        "group_size": parsed.group_size,
        "calibration_rows": parsed.calibration_rows,
        "max_validation_rows": 1,
        **METHODS[method],
    }
    if method in _STARTS:
        table |= {"start": f"quantize:start_w{bits}", "num_steps": parsed.scale_steps, "batch_size": parsed.batch_size}
    if method in ("block", "e2e", "rotated"):
        table["block_steps"] = parsed.block_steps
    if method == "e2e":
        table["scale_steps"] = parsed.scale_steps
    return table


def _dynamic_rules(parsed: argparse.Namespace, dense: Path, job: Path, bits: int) -> list[dict[str, Any]]:
    """Return the rules for layers that mlx-lm's dynamic_quant chooses: one bit less or more, as large as the width."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    rows = TokenFile.open(job / "artifacts/pretokenize/train.safetensors").rows
    chosen = rows.take(choose_rows(rows.marks, count=parsed.calibration_rows, seed=0)).tokens
    size, low, high = parsed.group_size, bits - 1, bits + 1
    tokens = mx.array(chosen.astype(np.int32))[:, :-1]
    found = dict(estimate_sensitivities(model_folder.load(dense)[0], tokens, low, size, high, size))
    stored = model_folder.load(dense)[0]
    stored.set_dtype(mx.bfloat16)
    threshold = estimate_threshold(stored, found, bits + 32 / size, low, size, high, size)
    return [{"match": path, "bits": high if cost > threshold else low} for path, cost in found.items()]


def _write_workflow(
    job: Path, parsed: argparse.Namespace, dense: Path, seed: str, variants: list[dict[str, Any]]
) -> None:
    articles, news = texts()
    workflow = {
        "workflow": {"seed": int(seed), "device": parsed.device, "stages": ["pretokenize", "quantize"]},
        "pretokenize": {
            "sources": [str(articles)],
            "validation_sources": [str(news)],
            "context_length": parsed.context_length,
            "tokenizer": {"from": str(dense)},
        },
        **({"quantize": variants} if variants else {}),
    }
    if not variants:
        workflow["workflow"]["stages"] = ["pretokenize"]  # type: ignore[index]
    (job / "workflow.toml").write_text(tomli_w.dumps(workflow))


def _command(job: Path, stage: str) -> None:
    subprocess.run([sys.executable, "-m", "mlxflow", "run", stage], cwd=job, check=True)


def _report_facts(artifact: Path) -> dict[str, Any]:
    import tomllib

    report = tomllib.loads((artifact / "report.toml").read_text())
    return {
        "bits_per_weight": report["bits_per_weight"],
        "calibration_text": report.get("calibration_text", ""),
        "overlap": report["quality"].get("overlap", 0.0),
        "peak_rss_bytes": report["run"]["peak_rss_bytes"],
        "peak_memory_bytes": report["run"].get("peak_memory_bytes", 0),
        "errors_of_blocks": [one["error"] for one in report.get("blocks", [])],
    }


class Judge:
    """Measures quantized models against a dense one on documents, one in a row, cut to the context.

    Args:
        dense: its folder.
        job: the folder with the artifact of pretokenize.
        cache: for the dense model's hidden states.
        documents: number of documents.
    """

    def __init__(self, dense: Path, job: Path, cache: Path, *, documents: int) -> None:
        file = TokenFile.open(job / "artifacts/pretokenize/validation.safetensors")
        self._rows = document_rows(file, documents)
        self._counts = (self._rows.marks[:, 1:] & 1).sum(axis=1)
        tokens = np.asarray(self._rows.tokens)
        key = {"tokens": tokens.tobytes().hex(), "model": str(dense), "device": str(mx.default_device())}
        self._reference = cached_reference(
            lambda: quantized_layers.for_evaluation(model_folder.load(dense, lazy=True)[0]),
            self._rows,
            folder=cache,
            key=digest_json(key),
            batch_size=32,
            masks_documents=False,
        )

    def figures(self, artifact: Path) -> dict[str, float]:
        """Return perplexities and divergence of a model folder, with standard errors over documents."""
        model = quantized_layers.for_evaluation(model_folder.load(artifact, lazy=True)[0])
        columns = compare_positions(self._reference, model, self._rows, batch_size=32, masks_documents=False)
        ends = np.cumsum(self._counts)
        sums = np.stack([part.sum(axis=1) for part in np.split(columns, ends[:-1], axis=1)], axis=1)
        means, errors = zip(*(ratio(one, self._counts) for one in sums), strict=True)
        increase, increase_error = ratio(sums[1] - sums[0], self._counts)  # paired: the same documents
        return {
            "documents": len(self._counts),
            "tokens": int(self._counts.sum()),
            "dense_perplexity": math.exp(means[0]),
            "dense_perplexity_standard_error": math.exp(means[0]) * errors[0],
            "perplexity": math.exp(means[1]),
            "perplexity_standard_error": math.exp(means[1]) * errors[1],
            "nats_lost": increase,
            "nats_lost_standard_error": increase_error,
            "kl": means[2],
            "kl_standard_error": errors[2],
            "top1_agreement": means[3],
        }


def document_rows(file: TokenFile, count: int) -> Rows:
    """Return the first documents that are long enough, each in a row of its own, cut to the context or padded."""
    length = file.context_length + 1
    chosen = [document for document in file.documents() if len(document) > _FEWEST_TARGETS][:count]
    tokens, marks = (np.zeros((len(chosen), length), kind) for kind in (np.uint32, np.uint8))
    for row, document in enumerate(chosen):
        used = min(length, len(document))
        tokens[row, :used] = document[:used]
        marks[row, :used] = 3
    return Rows(tokens, marks)


def ratio(sums: Any, counts: Any) -> tuple[float, float]:
    """Return the mean over all tokens, and its standard error over documents (ratio estimator).

    Args:
        sums: over the tokens of each document, (D,).
        counts: of its tokens, (D,).
    """
    mean = float(sums.sum() / counts.sum())
    number = len(sums)
    spread = np.square(sums - mean * counts).sum() * number / max(1, number - 1)
    return mean, float(math.sqrt(spread) / counts.sum())


def table_of(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one for each model, width and method, its seeds averaged."""
    yield (
        "| model | width | method | bits a weight | perplexity | increase | of the best of mlx-lm | KL to dense "
        "| seconds | resident GB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        key = (line["model"], line["bits"], line["group_size"])
        groups.setdefault(key, {}).setdefault(line["method"], []).append(line)
    for (model, bits, group_size), methods in groups.items():
        increases = {name: _increase(some) for name, some in methods.items()}
        best = min((increases[name] for name in MLX_LM if name in increases), default=math.nan)
        for name, some in methods.items():
            perplexity, error = _mean(some, "perplexity"), _mean(some, "perplexity_standard_error")
            yield (
                f"| {model} | w{bits}g{group_size} | {name} | {_mean(some, 'bits_per_weight'):.2f} "
                f"| {perplexity:.2f} ± {error:.2f}{_over_seeds(some)} "
                f"| {increases[name]:.1%} | {increases[name] / best:.2f} "
                f"| {_mean(some, 'kl'):.3f} ± {_mean(some, 'kl_standard_error'):.3f} "
                f"| {_mean(some, 'seconds'):,.0f} | {_mean(some, 'peak_rss_bytes') / 1e9:.2f} |"
            )


def _increase(lines: list[dict[str, Any]]) -> float:
    return _mean(lines, "perplexity") / _mean(lines, "dense_perplexity") - 1


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


def _over_seeds(lines: list[dict[str, Any]]) -> str:
    """Return the standard deviation of the perplexity over calibration seeds, in words; empty for one seed."""
    found = [line["perplexity"] for line in lines]
    return f" (seeds: ± {np.std(found, ddof=1):.2f})" if len(found) > 1 else ""


if __name__ == "__main__":
    main()
