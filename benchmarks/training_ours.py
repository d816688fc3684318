"""The reference job by this project's own trainer: loader, compiled update, memory limit and all."""

import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.training_peers import REFERENCE, STEPS, WARM, Job, build_model, print_row, random_rows


class Variant(NamedTuple):
    """A way of training the job.

    Attributes:
        precision: of weights and arithmetic, as `[train]` has it.
        grad_accum_steps: passes a step, each over as many fewer rows.
        fused_loss: whether logits are computed in parts.
        checkpoint_every: every which layer is checkpointed; 0 for none.
        limit_gb: memory limit; 0 for the device's own.
        max_grad_norm: 0 for no clipping.
        kernels: whether fused kernels are used.
        deterministic: whether two runs are equal to the bit.
        document_length: tokens of the documents that are kept apart in a row; 0 for one document a row.
    """

    precision: Literal["fp32", "bf16", "bf16-pure"] = "bf16-pure"
    grad_accum_steps: int = 1
    fused_loss: bool = False
    checkpoint_every: int = 0
    limit_gb: float = 0
    max_grad_norm: float = 0.0
    kernels: bool = True
    deterministic: bool = True
    document_length: int = 0


def ours(row: str, variant: Variant, *, job: Job = REFERENCE, team: Any = None) -> None:
    """Train and print the row; kernels are verified first, as a stage does it.

    Args:
        row: its name.
        variant: how it is trained.
        job: what is trained, by all ranks together.
        team: the ranks; None for one process.
    """
    import mlx.core as mx

    from mlxflow.device import compute_device
    from mlxflow.distributed.team import SOLO
    from mlxflow.kernels import model_kernels
    from mlxflow.training import build, kernel_selection
    from mlxflow.training.checkpoints import CheckpointStore
    from mlxflow.training.trainer import Session

    compute_device.bound_graphs(recomputes=bool(variant.checkpoint_every))
    limit = int(variant.limit_gb * 1e9) or int(compute_device.working_set_bytes() * 0.8)
    mx.set_memory_limit(limit)
    ahead = model_kernels.begin_verification() if variant.kernels else None
    settings = _settings(job, variant)
    model = build_model(job, "float32" if variant.precision == "fp32" else "bfloat16")
    model.train()
    rows = _rows(job, variant.document_length)
    subject = build.Subject(model, settings, job.vocab_size, job.length)
    folder = Path(tempfile.mkdtemp())
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    request = kernel_selection.KernelRequest("auto" if variant.kernels else "off", device, folder / "kernels.json")
    begin = time.perf_counter()
    use = kernel_selection.select_kernels(request, subject, rows.head(settings.batch_size), ahead)
    proof_seconds = time.perf_counter() - begin
    logs: list[dict[str, Any]] = []
    session = Session(CheckpointStore(folder, keep=1, settings={}, say=print), limit, logs.append, team=team or SOLO)
    data = build.make_data(rows, rows.head(1), settings, seed=0)
    with build.ready_trainer(subject, use, data, session) as trainer:
        result = trainer.run()
    figures = {
        "limit_gb": variant.limit_gb,
        "rows_a_pass": settings.batch_size,
        "kernels": len(use.selected),
        "proof_seconds": round(proof_seconds, 2),
        "compile_seconds": round(result.compile_seconds, 1),
    }
    _print_speed(row, job, [log for log in logs if log["kind"] == "train"], result.peak_memory_bytes, figures)


def _print_speed(row: str, job: Job, logs: list[dict[str, Any]], peak_bytes: int, figures: dict[str, Any]) -> None:
    """Print the row from the first log, after the compiled steps, to the last."""
    first, *_, last = logs
    seconds = last["seconds"] - first["seconds"]
    print_row(
        row,
        (last["tokens"] - first["tokens"]) / seconds,
        peak_bytes,
        job,
        **figures,
        data_wait_share=round((last["data_wait_seconds"] - first["data_wait_seconds"]) / seconds, 5),
        device_wait_share=round((last["device_wait_seconds"] - first["device_wait_seconds"]) / seconds, 3),
    )


def _rows(job: Job, document_length: int) -> Any:
    """Return the random rows with the marks of their documents."""
    from mlxflow.data.token_file import Rows

    tokens = random_rows(job)
    pieces = np.arange(tokens.shape[1]) // (document_length or tokens.shape[1]) + 1
    return Rows(tokens, np.broadcast_to(2 * pieces + 1, tokens.shape).astype(np.uint8))


def _settings(job: Job, variant: Variant) -> Any:
    """Return settings with a fixed batch size and learning rate, and as little as can be beside the steps."""
    from mlxflow.training.settings import TrainingSettings

    return TrainingSettings(
        num_steps=STEPS + WARM,
        batch_size=job.batch // variant.grad_accum_steps,
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
        grad_accum_steps=variant.grad_accum_steps,
        precision=variant.precision,
        fused_loss=variant.fused_loss,
        checkpoint_every=variant.checkpoint_every,
        lazy_eval_every=1,
        max_grad_norm=variant.max_grad_norm,
        deterministic=variant.deterministic,
        masks_documents=variant.document_length > 0,
        adjust_every=STEPS if variant.limit_gb else 0,
    )
