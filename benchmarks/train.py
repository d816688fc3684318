"""Training against its peers: tokens a second and peak memory, each row in a process of its own, paired in one run.

    python benchmarks/train.py gpu [ROW ...]    the reference job: SmolLM2-135M's shape, 16 x 1,024 random tokens a step
                                                (rows that begin with "1B": a 1-billion-parameter Llama, 8 x 2,048)
    python benchmarks/train.py rows             their names
    TINY=1 python benchmarks/train.py gpu ...   the same rows in a tiny shape, to try the script on any device
    python benchmarks/train.py cpu              the built-in corpus, each document a row for mlx-lm, packed for us
    CONTEXT=2048 python benchmarks/train.py cpu ... in mlx-lm's own longest rows

Prints one line of JSON a row; TFLOP/s are six times the parameters a token, against what the row of the matrix product
reaches. `gpu` needs a GPU (and PyTorch for its rows), `cpu` takes about ten minutes on two cores.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxflow.device import cpu_backend

STEPS, WARM = 30, 6
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49_152,
    "max_position_embeddings": 2048,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
LARGE_SHAPE = SHAPE | {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_768,
}
TINY_SHAPE = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


class Job(NamedTuple):
    """What is trained.

    Attributes:
        shape: of the model: its `config.json`.
        batch: rows a step.
        length: tokens of a row.
    """

    shape: dict[str, Any]
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def vocab_size(self) -> int:
        """Ids of tokens."""
        return int(self.shape["vocab_size"])

    @property
    def parameters(self) -> int:
        """Numbers in the matrices, the embedding being the head too."""
        hidden, heads = self.shape["hidden_size"], self.shape["num_attention_heads"]
        attention = hidden * hidden * 2 + 2 * hidden * hidden * self.shape["num_key_value_heads"] // heads
        block = attention + 3 * hidden * self.shape["intermediate_size"]
        return int(self.shape["num_hidden_layers"] * block + self.vocab_size * hidden)


REFERENCE, LARGE = Job(SHAPE, 16, 1024), Job(LARGE_SHAPE, 8, 2048)
if os.environ.get("TINY"):
    STEPS = 12
    REFERENCE, LARGE = Job(TINY_SHAPE, 16, 16), Job(TINY_SHAPE, 8, 32)


def _tell(row: str, tokens_per_second: float, peak_bytes: float, job: Job | None = None, **more: Any) -> None:
    told = {"row": row, "tokens_per_second": round(tokens_per_second), "peak_gb": round(peak_bytes / 1e9, 2)}
    if job is not None:
        told["tflops"] = round(6 * job.parameters * tokens_per_second / 1e12, 1)
    print(json.dumps(told | more), flush=True)


class _Reports:
    """Keeps what mlx-lm's trainer reports."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.logs.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


# --- the reference job


def _random_rows(job: Job) -> Any:
    size = ((STEPS + WARM) * job.batch, job.length + 1)
    return np.random.default_rng(0).integers(0, job.vocab_size, size=size).astype(np.int32)


def _model(job: Job, dtype: str) -> Any:
    import mlx.core as mx

    from mlxflow.models import model_folder

    model = model_folder.build(job.shape, seed=0)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model


def _mlx_lm(row: str, *, job: Job = REFERENCE) -> None:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, train

    model = _model(job, "bfloat16")
    data = [(line.tolist(), 0) for line in _random_rows(job)]
    told = _Reports()
    mx.reset_peak_memory()
    arguments = TrainingArgs(
        batch_size=job.batch,
        iters=STEPS + WARM,
        steps_per_report=6,
        max_seq_length=job.length + 1,
        adapter_file=tempfile.mkdtemp() + "/a.safetensors",
        steps_per_save=10**6,
    )
    with contextlib.redirect_stdout(sys.stderr):
        train(model, optim.AdamW(1e-4), data, None, arguments, training_callback=told)
    rate = statistics.median(log["iterations_per_second"] for log in told.logs[1:])
    _tell(row, rate * job.tokens, told.logs[-1]["peak_memory"] * 1e9, job)


def _naive(row: str, *, job: Job = REFERENCE) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    model = _model(job, "float32")
    optimizer = optim.AdamW(1e-4)
    compute = nn.value_and_grad(
        model, lambda model, x: nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean")
    )
    rows = _random_rows(job)
    mx.reset_peak_memory()
    begin = 0.0
    for number in range(STEPS + WARM):
        if number == WARM:
            begin = time.perf_counter()
        loss, gradients = compute(model, mx.array(rows[number * job.batch : (number + 1) * job.batch]))
        optimizer.update(model, gradients)
        mx.eval(loss, model.state, optimizer.state)
    _tell(row, STEPS * job.tokens / (time.perf_counter() - begin), mx.get_peak_memory(), job)


def _torch(row: str, *, job: Job = REFERENCE) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: value for key, value in job.shape.items() if key != "model_type"}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on which the row says nothing, but runs
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(device).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model)
    rows = _random_rows(job)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    begin = 0.0
    for number in range(STEPS + WARM):
        if number == WARM:
            wait()
            begin = time.perf_counter()
        batch = (
            torch.from_numpy(rows[number * job.batch : (number + 1) * job.batch]).long().to(device, non_blocking=True)
        )
        logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, job.vocab_size), batch[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait()
    seconds = time.perf_counter() - begin
    _tell(row, STEPS * job.tokens / seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0, job)


def _ours(
    row: str,
    *,
    job: Job = REFERENCE,
    accum: int = 1,
    precision: str = "bf16-pure",
    fused: bool = False,
    every: int = 0,
    limit_gb: float = 0,
    lazy: int = 1,
    max_grad_norm: float = 0.0,
    kernels: bool = True,
    deterministic: bool = True,
    document_length: int = 0,
) -> None:
    """Run this project's own trainer: loader, compiled update, memory limit and all."""
    import mlx.core as mx

    from mlxflow.data.token_file import Rows
    from mlxflow.device import compute_device
    from mlxflow.kernels import model_kernels
    from mlxflow.training import build, kernel_selection
    from mlxflow.training.checkpoints import CheckpointStore
    from mlxflow.training.trainer import Session

    compute_device.bound_graphs(recomputes=bool(every))
    limit = int(limit_gb * 1e9) or int(compute_device.working_set_bytes() * 0.8)
    mx.set_memory_limit(limit)
    ahead = model_kernels.begin_proof() if kernels else None
    settings = _settings(
        job.batch // accum,
        grad_accum_steps=accum,
        precision=precision,
        fused_loss=fused,
        checkpoint_every=every,
        lazy_eval_every=lazy,
        max_grad_norm=max_grad_norm,
        deterministic=deterministic,
        masks_documents=document_length > 0,
        adjust_every=STEPS if limit_gb else 0,
    )
    model = _model(job, "float32" if precision == "fp32" else "bfloat16")
    model.train()
    tokens = _random_rows(job)
    pieces = np.arange(tokens.shape[1]) // (document_length or tokens.shape[1]) + 1
    rows = Rows(tokens, np.broadcast_to(2 * pieces + 1, tokens.shape).astype(np.uint8))
    subject = build.Subject(model, settings, job.vocab_size, job.length)
    folder = Path(tempfile.mkdtemp())
    request = kernel_selection.KernelRequest("auto" if kernels else "off", _device(), folder / "kernels.json")
    begin = time.perf_counter()
    use = kernel_selection.select_kernels(request, subject, rows.head(settings.batch_size), ahead)
    proof_seconds = time.perf_counter() - begin
    logs: list[dict[str, Any]] = []
    session = Session(CheckpointStore(folder, keep=1, settings={}, say=print), limit, logs.append)
    data = build.make_data(rows, rows.head(1), settings, seed=0)
    with build.ready_trainer(subject, use, data, session) as trainer:
        result = trainer.run()
    first, *_, last = [record for record in logs if record["kind"] == "train"]
    seconds = last["seconds"] - first["seconds"]
    _tell(
        row,
        (last["tokens"] - first["tokens"]) / seconds,
        result.peak_memory_bytes,
        job,
        limit_gb=limit_gb,
        rows_a_pass=settings.batch_size,
        kernels=len(use.selected),
        proof_seconds=round(proof_seconds, 2),
        compile_seconds=round(result.compile_seconds, 1),
        data_wait_share=round((last["data_wait_seconds"] - first["data_wait_seconds"]) / seconds, 5),
        device_wait_share=round((last["device_wait_seconds"] - first["device_wait_seconds"]) / seconds, 3),
    )


def _settings(batch_size: int, **changes: Any) -> Any:
    """Return settings with a fixed batch size and learning rate, and as little as can be beside the steps."""
    from mlxflow.training.settings import TrainingSettings

    return TrainingSettings(
        num_steps=STEPS + WARM,
        batch_size=batch_size,
        dynamic_batch_size=False,
        schedule="constant",
        learning_rate=1e-4,
        warmup_steps=0,
        weight_decay=0.01,
        optimizer_options={},
        max_bad_steps=1,
        log_every=WARM,
        eval_every=0,
        max_validation_rows=1,
        save_every=0,
        workers=4,
    ).replace(**changes)


def _device() -> str:
    import mlx.core as mx

    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def _matrix_product(row: str) -> None:
    """Measure what the matrix units reach: bf16 products of 8,192 x 8,192."""
    import mlx.core as mx

    size = 256 if os.environ.get("TINY") else 8192
    a, b = (mx.random.normal((size, size), key=mx.random.key(seed)).astype(mx.bfloat16) for seed in (0, 1))
    mx.eval(a, b)
    times = []
    for _ in range(STEPS):
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval([a @ b for _ in range(4)])
        mx.synchronize()
        times.append((time.perf_counter() - begin) / 4)
    print(json.dumps({"row": row, "tflops": round(2 * size**3 / statistics.median(times) / 1e12, 1)}), flush=True)


_anew = partial(_ours, every=1, fused=True)
_large = partial(_ours, job=LARGE)

# None of the peers measures or clips the gradient's norm, nor do ours but where it is said.
GPU_ROWS: dict[str, Callable[[str], None]] = {
    "matrix product, bf16": _matrix_product,
    "mlx-lm trainer, bf16": _mlx_lm,
    "naive: fp32, uncompiled, evaluated each step": _naive,
    "PyTorch compiled, bf16": _torch,
    "mlxflow bf16-pure": _ours,
    "mlxflow bf16-pure, without kernels": partial(_ours, kernels=False),
    "mlxflow bf16-pure, not deterministic": partial(_ours, deterministic=False),
    "mlxflow bf16-pure, without kernels, not deterministic": partial(_ours, kernels=False, deterministic=False),
    "mlxflow bf16-pure, documents of 200 apart": partial(_ours, document_length=200),
    "mlxflow bf16-pure, documents of 200 apart, not deterministic": partial(
        _ours, document_length=200, deterministic=False
    ),
    "mlxflow bf16-pure, norm clipped": partial(_ours, max_grad_norm=1.0),
    "mlxflow bf16-pure, limit 16.9 GB": partial(_ours, limit_gb=16.9),
    "mlxflow bf16-pure, limit 16.5 GB": partial(_ours, limit_gb=16.5),
    "mlxflow bf16-pure, fused loss, limit 16 GB": partial(_ours, fused=True, limit_gb=16),
    **{
        f"mlxflow bf16-pure, every layer anew, fused loss, limit {limit} GB": partial(_anew, limit_gb=limit)
        for limit in (7.0, 5.5, 4.5)
    },
    "mlxflow bf16 with fp32 masters": partial(_ours, precision="bf16"),
    "mlxflow fp32": partial(_ours, precision="fp32"),
    "1B: mlx-lm trainer, bf16": partial(_mlx_lm, job=LARGE),
    "1B: PyTorch compiled, bf16": partial(_torch, job=LARGE),
    "1B: mlxflow bf16-pure": _large,
    "1B: mlxflow bf16-pure, without kernels": partial(_large, kernels=False),
    "1B: mlxflow bf16-pure, limit 45 GB": partial(_large, limit_gb=45),
    "1B: mlxflow bf16-pure, fused loss, limit 45 GB": partial(_large, fused=True, limit_gb=45),
    # the most that fits in 16 GB: of these the one with the most rows in a pass whose peak is under it
    **{
        f"1B: mlxflow bf16-pure, {8 // accum} rows a pass, every layer anew, fused loss, limit 15.5 GB": partial(
            _large, accum=accum, every=1, fused=True, limit_gb=15.5
        )
        for accum in (1, 2, 4, 8)
    },
}


# --- the built-in corpus on the CPU

# In a context of 64 most documents are cut, in one of 2,048, mlx-lm's own limit, most end in it
CPU_LENGTH = int(os.environ.get("CONTEXT", "64"))
CPU_BATCH = max(4, 2048 // CPU_LENGTH)

# that come to about 200,000 real tokens in either
STEPS_OF = {64: (("cpu-mlxflow", 100), ("cpu-mlx-lm", 100)), 2048: (("cpu-mlxflow", 24), ("cpu-mlx-lm", 36))}


def _corpus(folder: Path) -> Path:
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


def _cpu_mlx_lm(folder: Path) -> None:
    """Train mlx-lm's way: each document padded or cut to the context, the trainer as it is shipped."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train

    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.perplexity import measure_perplexity
    from mlxflow.models import model_folder

    tokens, validation = TokenFile.open(folder / "train.safetensors"), TokenFile.open(folder / "validation.safetensors")
    documents = [document.tolist() for document in tokens.documents()]
    model = model_folder.build(_small(tokens), seed=0)

    class Documents:
        def __len__(self) -> int:
            return len(documents)

        def __getitem__(self, index: int) -> list[int]:
            found: list[int] = documents[index]
            return found

        def process(self, item: list[int]) -> tuple[list[int], int]:
            return item, 0

    told = _Reports()
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
        train(model, optim.AdamW(3e-3), CacheDataset(Documents()), None, arguments, training_callback=told)
    seconds = time.perf_counter() - begin
    peak = mx.get_peak_memory()
    measured = measure_perplexity(model, validation.rows.head(8), batch_size=CPU_BATCH)
    real = told.logs[-1]["trained_tokens"]
    _tell("mlx-lm trainer", real / seconds, peak, tokens=real, validation_loss=round(measured.loss, 4))


def _cpu_ours(folder: Path) -> None:
    """Train this project's way: packed rows, the stage's own settings."""
    import shutil

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
    made = execute_stage(workflow, workflow.find("train"))
    report = report_files.read_report(made / "report.toml")
    run = report["run"]
    _tell(
        "mlxflow",
        report["tokens"] / run["training_seconds"],
        run["training_peak_memory_bytes"],
        tokens=report["tokens"],
        validation_loss=round(float(np.log(report["last_validation_perplexity"])), 4),
        data_wait_share=round(run["data_wait_seconds"] / run["training_seconds"], 5),
    )


def _main() -> None:
    match sys.argv[1:]:
        case ["row", name]:
            GPU_ROWS[name](name)
        case ["rows"]:
            print("\n".join(GPU_ROWS))
        case ["gpu", *names] if unknown := [name for name in names if name not in GPU_ROWS]:
            sys.exit(f"no row {unknown[0]!r}; `python benchmarks/train.py rows` lists them")
        case ["gpu", *names]:
            for name in names or GPU_ROWS:
                done = subprocess.run([sys.executable, __file__, "row", name], check=False)
                if done.returncode:
                    print(json.dumps({"row": name, "failed": done.returncode}), flush=True)
        case ["cpu-mlx-lm", made]:
            _cpu_mlx_lm(Path(made))
        case ["cpu-mlxflow", made]:
            _cpu_ours(Path(made))
        case ["cpu", *rounds]:
            with tempfile.TemporaryDirectory() as room:
                folder = _corpus(Path(room))
                for _ in range(int(rounds[0]) if rounds else 3):  # in turn: what else the machine does hits both
                    for row, steps in STEPS_OF[CPU_LENGTH]:
                        command = [sys.executable, __file__, row, str(folder)]
                        subprocess.run(command, check=True, env={**os.environ, "STEPS": str(steps)})
        case _:
            print(__doc__)


if __name__ == "__main__":
    cpu_backend.prepare()
    _main()
