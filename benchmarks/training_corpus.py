"""The built-in corpus on the CPU: mlx-lm's trainer, each document a row, beside the stage `train`, rows packed."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_peers import TrainerReports, print_row

# In a context of 64 most documents are cut, in one of 2,048, mlx-lm's own limit, most end in it
CPU_LENGTH = int(os.environ.get("CONTEXT", "64"))
CPU_BATCH = max(4, 2048 // CPU_LENGTH)

# that come to about 200,000 real tokens in either
STEPS_OF = {64: (("cpu-mlxflow", 100), ("cpu-mlx-lm", 100)), 2048: (("cpu-mlxflow", 24), ("cpu-mlx-lm", 36))}


def tokenize_corpus(folder: Path) -> Path:
    """Tokenize the built-in corpus as the default workflow does; return its artifact."""
    from mlxflow.workflow.execution import execute_stage
    from mlxflow.workflow.loader import load_workflow

    (folder / "workflow.toml").write_text(f"[pretokenize]\nworkers = 2\ncontext_length = {CPU_LENGTH}\n")
    workflow = load_workflow(folder / "workflow.toml")
    return execute_stage(workflow, workflow.find("pretokenize"))


def _small(tokens: Any) -> dict[str, Any]:
    from mlxflow.models.new_model import ModelConfig, llama_config

    return llama_config(
        ModelConfig(),
        vocab_size=tokens.vocab_size,
        context_length=tokens.context_length,
        end_of_text=tokens.end_of_text,
    )


def train_by_mlx_lm(folder: Path) -> None:
    """Train mlx-lm's way: each document padded or cut to the context, the trainer as it is shipped."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train

    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.perplexity import measure_perplexity
    from mlxflow.models import model_folder

    tokens, validation = TokenFile.open(folder / "train.safetensors"), TokenFile.open(folder / "validation.safetensors")
    documents: list[list[int]] = [document.tolist() for document in tokens.documents()]
    model = model_folder.build(_small(tokens), seed=0)

    class Documents:
        def __len__(self) -> int:
            return len(documents)

        def __getitem__(self, index: int) -> list[int]:
            return documents[index]

        def process(self, item: list[int]) -> tuple[list[int], int]:
            return item, 0

    reports = TrainerReports()
    arguments = TrainingArgs(
        batch_size=CPU_BATCH,
        iters=int(os.environ["STEPS"]),
        steps_per_report=10,
        max_seq_length=tokens.context_length + 1,
        adapter_file=tempfile.mkdtemp() + "/a.safetensors",
        steps_per_save=10**6,
    )
    mx.reset_peak_memory()
    begin = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        train(model, optim.AdamW(3e-3), CacheDataset(Documents()), None, arguments, training_callback=reports)
    seconds = time.perf_counter() - begin
    peak = mx.get_peak_memory()
    measured = measure_perplexity(model, validation.rows.head(8), batch_size=CPU_BATCH)
    real = reports.logs[-1]["trained_tokens"]
    print_row("mlx-lm trainer", real / seconds, peak, tokens=real, validation_loss=round(measured.loss, 4))


def train_by_mlxflow(folder: Path) -> None:
    """Train this project's way: packed rows, the stage's own settings."""
    from mlxflow.storage import report_files
    from mlxflow.workflow.execution import execute_stage
    from mlxflow.workflow.loader import load_workflow

    job = Path(tempfile.mkdtemp())
    (job / "artifacts").mkdir()
    shutil.copytree(folder, job / "artifacts" / "pretokenize")
    settings = {
        "num_steps": os.environ["STEPS"],
        "batch_size": CPU_BATCH,
        "max_validation_rows": 8,
        "learning_rate": 3e-3,
        "schedule": '"constant"',
        "warmup_steps": 0,
        "eval_every": 0,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "max_grad_norm": 0.0,
        "save_every": 0,
    }
    (job / "workflow.toml").write_text("\n".join(["[train]", *(f"{key} = {value}" for key, value in settings.items())]))
    workflow = load_workflow(job / "workflow.toml")
    artifact = execute_stage(workflow, workflow.find("train"))
    report = report_files.read_report(artifact / "report.toml")
    run = report["run"]
    print_row(
        "mlxflow",
        report["tokens"] / run["training_seconds"],
        run["training_peak_memory_bytes"],
        tokens=report["tokens"],
        validation_loss=round(float(np.log(report["last_validation_perplexity"])), 4),
        data_wait_share=round(run["data_wait_seconds"] / run["training_seconds"], 5),
    )
