"""The reference job of training on a GPU, and its peers: mlx-lm's trainer, plain MLX, PyTorch, and a matrix product."""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shapes import LLAMA_1B, SMOLLM2_135M, TINY_LLAMA

STEPS, WARM = 30, 6


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


REFERENCE, LARGE = Job(SMOLLM2_135M, 16, 1024), Job(LLAMA_1B, 8, 2048)
if os.environ.get("TINY"):
    STEPS = 12
    REFERENCE, LARGE = Job(TINY_LLAMA, 16, 16), Job(TINY_LLAMA, 8, 32)


def print_row(row: str, tokens_per_second: float, peak_bytes: float, job: Job | None = None, **figures: Any) -> None:
    """Print one line of JSON: speed, peak memory, TFLOP/s where the job is known, and further figures."""
    line = {"row": row, "tokens_per_second": round(tokens_per_second), "peak_gb": round(peak_bytes / 1e9, 2)}
    if job is not None:
        line["tflops"] = round(6 * job.parameters * tokens_per_second / 1e12, 1)
    print(json.dumps(line | figures), flush=True)


class TrainerReports:
    """A callback of mlx-lm's trainer that keeps its reports."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """Keep a report."""
        self.logs.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """Ignore the validation loss."""


def random_rows(job: Job) -> Any:
    """Return the rows of all steps, (N, L + 1), of random tokens."""
    size = ((STEPS + WARM) * job.batch, job.length + 1)
    return np.random.default_rng(0).integers(0, job.vocab_size, size=size).astype(np.int32)


def build_model(job: Job, dtype: str) -> Any:
    """Return a model of the job's shape with random weights of a type."""
    import mlx.core as mx

    from mlxflow.models import model_folder

    model = model_folder.build(job.shape, seed=0)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model


def mlx_lm(row: str, *, job: Job = REFERENCE, dtype: str = "bfloat16") -> None:
    """Train by mlx-lm's own trainer, as it is shipped."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, train

    model = build_model(job, dtype)
    data = [(line.tolist(), 0) for line in random_rows(job)]
    reports = TrainerReports()
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
        train(model, optim.AdamW(1e-4), data, None, arguments, training_callback=reports)
    rate = statistics.median(log["iterations_per_second"] for log in reports.logs[1:])
    print_row(row, rate * job.tokens, reports.logs[-1]["peak_memory"] * 1e9, job)


def naive(row: str, *, job: Job = REFERENCE) -> None:
    """Train in fp32 without compilation; every step is evaluated."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    model = build_model(job, "float32")
    optimizer = optim.AdamW(1e-4)
    compute = nn.value_and_grad(
        model, lambda model, x: nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean")
    )
    rows = random_rows(job)
    mx.reset_peak_memory()
    begin = 0.0
    for number in range(STEPS + WARM):
        if number == WARM:
            begin = time.perf_counter()
        loss, gradients = compute(model, mx.array(rows[number * job.batch : (number + 1) * job.batch]))
        optimizer.update(model, gradients)
        mx.eval(loss, model.state, optimizer.state)
    print_row(row, STEPS * job.tokens / (time.perf_counter() - begin), mx.get_peak_memory(), job)


def pytorch(row: str, *, job: Job = REFERENCE) -> None:
    """Train by PyTorch, compiled, with its fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: value for key, value in job.shape.items() if key != "model_type"}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on which the row says nothing, but runs
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(device).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model)
    rows = random_rows(job)
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
    print_row(row, STEPS * job.tokens / seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0, job)


def matrix_product(row: str) -> None:
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
