"""Fine-tuning by this project's trainer, by mlx-lm's own command, and by PyTorch with dense LoRA layers."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.finetune_folder import Job, padded_rows, token_rows
from benchmarks.training_peers import TrainerReports

_RANK, _SCALE = 8, 20.0


class Speed(NamedTuple):
    """What a row measured.

    Attributes:
        seconds: of each step, or of each but the first.
        losses: of each step.
        peak_bytes: of MLX's or PyTorch's arrays.
        begin: when the first step ended, by the clock of `started`.
    """

    seconds: Sequence[float]
    losses: Sequence[float]
    peak_bytes: float
    begin: float = 0.0


def print_speed(row: str, job: Job, speed: Speed, **figures: Any) -> None:
    """Print one line of JSON: tokens a second over the timed steps, peaks, and the first losses."""
    steady = speed.seconds[-job.steps :]
    line = {
        "row": row,
        "tokens_per_second": round(job.tokens / float(np.mean(steady)), 1),
        "peak_gb": round(speed.peak_bytes / 1e9, 2),
        "process_peak_gb": round(_process_peak() / 1e9, 2),
        "losses": [round(loss, 5) for loss in speed.losses[:4]],
    }
    print(json.dumps(line | figures), flush=True)


def _process_peak() -> int:
    """Return the most resident memory that this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * 1024 if sys.platform.startswith("linux") else peak


def ours(row: str, job: Job, folder: Path, *, checkpointing: str | int = "none", limit_gb: float = 0) -> None:
    """Fine-tune by this project's trainer and print the row; kernels are verified first, as a stage does it.

    Args:
        row: its name.
        job: what is trained.
        folder: with its model.
        checkpointing: as `[train]` has it.
        limit_gb: memory limit; 0 for the device's own.
    """
    import mlx.core as mx

    from mlxflow.data.token_file import Rows
    from mlxflow.device import compute_device
    from mlxflow.kernels import model_kernels
    from mlxflow.training import build, kernel_selection
    from mlxflow.training.checkpointing_choice import choose_checkpointing
    from mlxflow.training.checkpoints import CheckpointStore
    from mlxflow.training.trainer import Session

    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    compute_device.bound_graphs(recomputes=checkpointing != "none")
    limit = int(limit_gb * 1e9) or int(compute_device.working_set_bytes() * 0.8)
    mx.set_memory_limit(limit)
    ahead = model_kernels.begin_verification() if device == "gpu" else None
    begin = time.perf_counter()
    subject, figures = _opened(job, folder, checkpointing)
    rows = Rows(*padded_rows(job, folder))
    scratch = Path(tempfile.mkdtemp())
    request = kernel_selection.KernelRequest("auto", device, scratch / "kernels.json")
    opened = time.perf_counter()
    use = kernel_selection.select_kernels(request, subject, rows, ahead)
    selected = time.perf_counter()
    if checkpointing == "auto":
        choice = choose_checkpointing(subject, use, rows, limit_bytes=limit)
        figures["chosen"] = choice.line
        subject = subject._replace(settings=choice.layers.applied_to(subject.settings))
    logs: list[dict[str, Any]] = []
    store = CheckpointStore(scratch, keep=1, settings={}, say=print)
    session = Session(store, limit, lambda record: logs.append(record | {"at": time.perf_counter()}))
    data = build.make_data(rows, rows.head(1), subject.settings, seed=0)
    with build.ready_trainer(subject, use, data, session) as trainer:
        ready = time.perf_counter()
        result = trainer.run()
    records = [log for log in logs if log["kind"] == "train"]
    ends = [record["seconds"] for record in records]
    speed = Speed(np.diff(ends).tolist(), [record["loss"] for record in records], result.peak_memory_bytes)
    figures |= {"kernels": list(use.selected), "refused": dict(use.refused)}
    validated = next(log["at"] for log in logs if log["kind"] == "validation")
    figures |= _start((begin, opened, selected, ready, validated, validated + ends[0]))
    print_speed(row, job, speed, limit_gb=limit_gb, **figures)


def _start(times: Sequence[float]) -> dict[str, Any]:
    """Return the seconds to the end of the first step and their parts, from the time at which each part begins."""
    names = ("open", "kernels", "trainer", "validation", "step")
    parts = dict(zip(names, np.diff(times).round(2).tolist(), strict=True))
    return {"to_first_step_seconds": round(times[-1] - times[0], 1), "first_step_parts": parts}


def _opened(job: Job, folder: Path, checkpointing: str | int) -> tuple[Any, dict[str, Any]]:
    """Return the job's model, ready to be trained, and figures of its loading."""
    from mlxflow.device import phase_peaks
    from mlxflow.models import model_folder
    from mlxflow.training import build, objective
    from mlxflow.training.settings import Recomputation

    begin, before = time.perf_counter(), psutil.Process().memory_info().rss
    stored = (folder / "model" / "model.safetensors").stat().st_size
    model, _ = model_folder.load(folder / "model")
    figures = {"load_process_over_file": round((_process_peak() - before) / stored, 3)}
    settings = _settings(job, Recomputation.of(checkpointing))
    build.prepare_model(model, settings, adapter_seed=0)
    figures["prepared_process_over_file"] = round((_process_peak() - before) / stored, 3)
    figures["load_seconds"] = round(time.perf_counter() - begin, 1)
    figures["load_peak_gb"] = round(phase_peaks.process_peak() / 1e9, 2)
    vocab_size = model_folder.vocab_size(folder / "model")
    fused = objective.uses_fused_loss(model, wanted=None, vocab_size=vocab_size, tokens=job.tokens)
    subject = build.Subject(model, settings.replace(fused_loss=fused), vocab_size, job.length)
    return subject, figures | {"fused_loss": fused}


def _settings(job: Job, layers: Any) -> Any:
    """Return settings with a fixed batch size and learning rate, and as little as can be beside the steps."""
    from mlxflow.training.settings import AdapterShape, TrainingSettings

    shape = AdapterShape(
        method="dora" if job.method == "dora" else "lora",
        rank=_RANK,
        scale=_SCALE,
        dropout=0.0,
        num_layers=0,
        keys=("self_attn.*", "mlp.*"),
    )
    return TrainingSettings(
        adapters="none" if job.method == "full" else shape,
        num_steps=job.steps + job.warm + 1,
        batch_size=job.batch,
        dynamic_batch_size=False,
        schedule="constant",
        learning_rate=job.learning_rate,
        warmup_steps=0,
        weight_decay=0.01,
        optimizer_options={},
        max_grad_norm=0.0,
        max_bad_steps=1,
        log_every=1,
        lazy_eval_every=1,
        eval_every=0,
        max_validation_rows=1,
        save_every=0,
        workers=1,
        adjust_every=0,
        precision=job.precision,
        checkpoint_every=layers.every,
        checkpoint_segment=layers.segment,
    )


def mlx_lm(row: str, job: Job, folder: Path, *, recomputes: bool) -> None:
    """Fine-tune by `mlx_lm.lora`, its own command with a callback for its reports, and print the row."""
    from mlx_lm import lora

    reports = TrainerReports()
    lora.get_reporting_callbacks = lambda *_, **__: reports
    scratch = Path(tempfile.mkdtemp())
    settings = {
        "model": str(folder / "model"),
        "train": True,
        "data": str(folder / "data"),
        "fine_tune_type": job.method,
        "optimizer": "adamw",
        "num_layers": -1,
        "batch_size": job.batch,
        "iters": job.steps + job.warm,
        "val_batches": 1,
        "steps_per_eval": 10**6,
        "steps_per_report": 1,
        "learning_rate": job.learning_rate,
        "max_seq_length": job.length + 1,
        "grad_checkpoint": recomputes,
        "lora_parameters": {"rank": _RANK, "dropout": 0.0, "scale": _SCALE},
        "adapter_path": str(scratch),
    }
    if job.method == "full":  # there -1 stands for no layer
        settings["num_layers"] = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
    (scratch / "config.json").write_text(json.dumps(settings))  # JSON is YAML
    sys.argv = ["mlx_lm.lora", "--config", str(scratch / "config.json")]
    lora.main()
    seconds = [1 / log["iterations_per_second"] for log in reports.logs]
    losses = [log["train_loss"] for log in reports.logs]
    print_speed(row, job, Speed(seconds, losses, reports.logs[-1]["peak_memory"] * 1e9))


def torch_lora(row: str, job: Job, folder: Path, *, recomputes: bool) -> None:
    """Fine-tune dense random weights of the same shape in bf16 by PyTorch, and print the row; losses are of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    shape = {key: value for key, value in job.shape.items() if key != "model_type"}
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    model.requires_grad_(job.method == "full")
    if job.method != "full":
        _add_torch_lora(torch, model)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, fused=device == "cuda")
    rows = torch.from_numpy(token_rows(job, folder)).long().to(device)
    seconds, losses = [], []
    for _ in range(job.steps + job.warm):
        begin = time.perf_counter()
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.reshape(-1, job.shape["vocab_size"])
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print_speed(row, job, Speed(seconds, losses, peak))


def _add_torch_lora(torch: Any, model: Any) -> None:
    class Adapted(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.linear = linear
            columns, rows = linear.in_features, linear.out_features
            where = {"device": linear.weight.device}
            self.a = torch.nn.Parameter(torch.randn(_RANK, columns, **where) / columns**0.5)
            self.b = torch.nn.Parameter(torch.zeros(rows, _RANK, **where))

        def forward(self, x: Any) -> Any:
            linear = torch.nn.functional.linear
            return self.linear(x) + linear(linear(x, self.a), self.b) * _SCALE

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(block, name, Adapted(child))
