"""Quality of quantized real models: every method beside mlx-lm's, on one calibration text, judged on another one.

`python -m benchmarks.quality run smollm2 --folder DIR` quantizes by the stage `quantize`, each variant in a process of
its own, prints a line of JSON for each as it finishes and appends it to DIR/results.jsonl: stored bits of a weight from
the file, perplexity and divergence from the dense model with standard errors over documents, greedy continuations of a
few prompts, seconds and resident memory. Variants that have a line are left out, so a run can be continued, and after
`--seconds` none is begun. Calibration rows, the dense model's hidden states and the blocks that several methods start
from are computed once. `python -m benchmarks.quality table DIR/results.jsonl` prints the table and what the models
write.

GPTQ, AWQ and DWQ use mlx-lm's functions (of AWQ, its search); `dynamic` is mlx-lm's dynamic_quant between one bit less
and one bit more, with the threshold that gives the size of the width. All of them, and rounding, quantize embedding and
head with the same bits as the rest. `scales` and `all` train scales, or all, from the codes of `block` (qat's `start`),
`e2e` does so within `block`. `budget` chooses bits and group sizes by the methods of `--budget-methods`, beside
`uniform` plans of the same sizes.

TINY=1 in the environment makes a trial of all of it on a small random model with few steps: `TINY=1 python -m
benchmarks.quality run tiny --folder DIR`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx
import tomli_w

from benchmarks.processes import let_children_import_checkout
from benchmarks.quality_judge import Judge, continuations
from benchmarks.quality_rows import EXTRA, METHODS, STARTS, UNIFORM, Row, rows_of
from benchmarks.quality_table import table_of, texts_of
from benchmarks.real_models import MODELS
from benchmarks.real_texts import texts
from mlxflow.data.token_file import TokenFile
from mlxflow.models import model_folder
from mlxflow.quantization.calibration_text import choose_text

_IS_TINY = bool(os.environ.get("TINY"))


def main() -> None:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="quantize and judge")
    run.add_argument("model", help="smollm2, gemma3, a model folder, or tiny")
    run.add_argument("--folder", type=Path, required=True, help="for artifacts and results")
    run.add_argument("--seconds", type=float, default=float("inf"), help="after which no further row is begun")
    run.add_argument("--widths", default="4,3,2")
    run.add_argument("--group-size", type=int, default=64)
    run.add_argument("--embedding-bits", type=int, default=0, help="of the embedding at each width; 0: as all others")
    run.add_argument("--methods", default=",".join(name for name in METHODS if name not in EXTRA))
    run.add_argument("--budgets", default="2.5,3.0,3.5", help=f"of {', '.join(map(str, UNIFORM))}")
    run.add_argument("--budget-methods", default="rtn", help="of the stage, such as rtn,block")
    run.add_argument("--seeds", default="0")
    run.add_argument("--context-length", type=int, default=32 if _IS_TINY else 256)
    run.add_argument("--calibration-rows", type=int, default=8 if _IS_TINY else 128)
    run.add_argument("--block-steps", type=int, default=2 if _IS_TINY else 100)
    run.add_argument("--scale-steps", type=int, default=2 if _IS_TINY else 100, help="of e2e, scales and all")
    run.add_argument("--learning-rate", type=float, default=0.0, help="of scales and all; 0: that of the stage")
    run.add_argument("--batch-size", type=int, default=8, help="of scales and all")
    run.add_argument("--documents", type=int, default=4 if _IS_TINY else 100, help="news articles that judge")
    run.add_argument("--device", default="auto")
    run.add_argument("--write", type=int, default=4 if _IS_TINY else 32, help="tokens of each continuation; 0: none")
    table = verbs.add_parser("table", help="print the table of results, and what the models write")
    table.add_argument("results", type=Path)
    parsed = parser.parse_args()
    if parsed.verb == "table":
        lines = [json.loads(line) for line in parsed.results.read_text().splitlines()]
        print("\n".join([*table_of(lines), "", *texts_of(lines)]))
    else:
        raise SystemExit(_run(parsed))


def _run(parsed: argparse.Namespace) -> int:
    """Run the rows that have no line yet; return 1 if one of them failed."""
    begin = time.perf_counter()
    if parsed.device != "auto":
        mx.set_default_device(getattr(mx, parsed.device))
    folder: Path = parsed.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    dense = _dense(parsed.model, folder)
    results = folder / "results.jsonl"
    known = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    rows = [row for row in rows_of(parsed) if _name(parsed, row) not in known]
    judges: dict[int, Judge] = {}
    failed = False
    for number, row in enumerate(rows):
        if time.perf_counter() - begin > parsed.seconds:
            print(f"{parsed.seconds:.0f} s are over: {len(rows) - number} rows are left", file=sys.stderr)
            break
        job = folder / f"seed{row.seed}"
        if row.seed not in judges:
            _prepare(job, parsed, dense, row.seed)
            judges[row.seed] = Judge(dense, job, folder / "cache", documents=parsed.documents)
        try:
            line = _measured(parsed, row, dense, job, judges[row.seed])
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{_name(parsed, row)}: failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
            continue
        with results.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return int(failed)


def _name(parsed: argparse.Namespace, row: Row) -> str:
    return f"{parsed.model} {row.label} {row.size} seed {row.seed}"


def _measured(parsed: argparse.Namespace, row: Row, dense: Path, job: Path, judge: Judge) -> dict[str, Any]:
    """Quantize a variant and return its line."""
    begin = time.perf_counter()
    artifact, facts = dense, {"bits_per_weight": 16.0, "peak_rss_bytes": 0, "peak_memory_bytes": 0}
    started = 0.0
    if row.method != "dense":
        tables = [{"name": row.variant, **_table(parsed, row, dense, job)}]
        if row.method in STARTS:
            block = row._replace(method="block")
            tables.insert(0, {"name": block.variant, **_table(parsed, block, dense, job)})
        _write_workflow(job, parsed, dense, row.seed, tables)
        for table in tables:
            artifact = job / "artifacts/quantize" / str(table["name"])
            if table is tables[-1] or not artifact.exists():
                _command(job, f"quantize:{table['name']}")
            elif table is not tables[-1]:
                started = _report(artifact)["run"]["seconds"]
        facts = _facts(_report(artifact))
    seconds = time.perf_counter() - begin + started
    line = {
        "name": _name(parsed, row),
        "model": parsed.model,
        "method": row.label,
        "size": row.size,
        "bits": row.bits,
        "group_size": row.group_size,
        "seed": row.seed,
        "device": str(mx.default_device()),
        "seconds": round(seconds, 1),
        **facts,
        **judge.figures(artifact),
    }
    return line | ({"texts": continuations(artifact, num_tokens=parsed.write)} if parsed.write else {})


def _table(parsed: argparse.Namespace, row: Row, dense: Path, job: Path) -> dict[str, Any]:
    """Return the `[quantize]` table of a variant."""
    table: dict[str, Any] = {
        "model": str(dense),
        "data": "pretokenize",
        "calibration_rows": parsed.calibration_rows,
        "max_validation_rows": 1,
        **METHODS[row.method],
    }
    if row.by:
        table["method"] = row.by
    if row.method == "budget":
        table["target_bits_per_weight"] = _room(row, job)
    elif row.method not in STARTS:
        table |= {"bits": row.bits, "group_size": row.group_size}
    if row.method in STARTS:
        block = row._replace(method="block")
        table |= {"start": f"quantize:{block.variant}", "num_steps": parsed.scale_steps}
        table["batch_size"] = parsed.batch_size
        if parsed.learning_rate:
            table["learning_rate"] = parsed.learning_rate
        del table["calibration_rows"]
    if parsed.embedding_bits and row.bits:
        table["layers"] = [{"match": "*embed_tokens", "bits": parsed.embedding_bits}]
    if table.get("method") == "block":
        table["block_steps"] = parsed.block_steps
    if row.method == "e2e":
        table["scale_steps"] = parsed.scale_steps
    if row.method == "dynamic":
        table["layers"] = _dynamic_rules(parsed, dense, job, row.bits)
    return table


def _room(row: Row, job: Path) -> float:
    """Return the bits of a weight that a budget may take: as many as the uniform plan with all that stays dense."""
    bits, group_size = UNIFORM[row.budget]
    rival = row._replace(method="uniform", bits=bits, group_size=group_size)
    artifact = job / "artifacts/quantize" / rival.variant
    if not artifact.exists():
        return row.budget
    return max(row.budget, round(float(_report(artifact)["bits_per_weight"]) + 0.001, 4))


def _dynamic_rules(parsed: argparse.Namespace, dense: Path, job: Path, bits: int) -> list[dict[str, Any]]:
    """Return the rules for layers that mlx-lm's dynamic_quant chooses: one bit less or more, as large as the width."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    rows = TokenFile.open(job / "artifacts/pretokenize/train.safetensors").rows
    chosen = choose_text(rows, count=parsed.calibration_rows, seed=0).tokens
    size, low, high = parsed.group_size, bits - 1, bits + 1
    tokens = mx.array(chosen.astype(np.int32))[:, :-1]
    found = dict(estimate_sensitivities(model_folder.load(dense)[0], tokens, low, size, high, size))
    stored = model_folder.load(dense)[0]
    stored.set_dtype(mx.bfloat16)
    threshold = estimate_threshold(stored, found, bits + 32 / size, low, size, high, size)
    return [{"match": path, "bits": high if cost > threshold else low} for path, cost in found.items()]


def _dense(name: str, folder: Path) -> Path:
    """Return the folder of the dense model."""
    if name in MODELS:
        return MODELS[name]()
    return _tiny(folder / "tiny") if name == "tiny" else Path(name)


def _tiny(folder: Path) -> Path:
    """Return the folder of a random model with two layers, whose tokenizer knows the texts."""
    from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
    from mlxflow.data.tokenizer_folder import save_vocabulary
    from tests.small_models import llama

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    news = [json.loads(line)["text"] for line in texts()[1].read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(news[:50], vocab_size=512, special_tokens=["<|endoftext|>"])
    vocabulary = trained_vocabulary(tokenizer.to_str(), context_length=512, template=None)
    save_vocabulary(vocabulary, tokenizer_file=folder / "tokenizer.json", config_file=folder / "tokenizer_config.json")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_heads": 2}
    model, config = llama(vocab_size=vocabulary.size, context_length=512, **shape)
    files = {"config_file": folder / "config.json", "model_file": folder / "model.safetensors"}
    model_folder.save(model=model, config=config, provenance={}, **files)
    return folder


def _prepare(job: Path, parsed: argparse.Namespace, dense: Path, seed: int) -> None:
    """Make the token files of a seed, unless they are there."""
    job.mkdir(exist_ok=True)
    _write_workflow(job, parsed, dense, seed, [])
    if not (job / "artifacts/pretokenize").exists():
        _command(job, "pretokenize")


def _write_workflow(
    job: Path, parsed: argparse.Namespace, dense: Path, seed: int, variants: list[dict[str, Any]]
) -> None:
    articles, news = texts()
    workflow: dict[str, Any] = {
        "workflow": {
            "seed": seed,
            "device": parsed.device,
            "stages": ["pretokenize", *(["quantize"] if variants else [])],
        },
        "pretokenize": {
            "sources": [str(articles)],
            "validation_sources": [str(news)],
            "context_length": parsed.context_length,
            "tokenizer": {"from": str(dense)},
        },
        **({"quantize": variants} if variants else {}),
    }
    (job / "workflow.toml").write_text(tomli_w.dumps(workflow))


def _command(job: Path, stage: str) -> None:
    # its output goes to standard error: standard output has the lines of JSON alone
    subprocess.run([sys.executable, "-m", "mlxflow", "run", stage], cwd=job, check=True, stdout=sys.stderr)


def _report(artifact: Path) -> dict[str, Any]:
    return tomllib.loads((artifact / "report.toml").read_text())


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits_per_weight": report["bits_per_weight"],
        "calibration_text": report.get("calibration_text", ""),
        "overlap": report["quality"].get("overlap", 0.0),
        "peak_rss_bytes": report["run"]["peak_rss_bytes"],
        "peak_memory_bytes": report["run"].get("peak_memory_bytes", 0),
        "errors_of_blocks": [one["error"] for one in report.get("blocks", [])],
    }


if __name__ == "__main__":
    let_children_import_checkout()
    main()
