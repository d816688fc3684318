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

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package
from benchmarks.processes import let_children_import_checkout
from benchmarks.training_corpus import CPU_LENGTH, STEPS_OF, tokenize_corpus, train_by_mlx_lm, train_by_mlxflow
from benchmarks.training_ours import Variant, ours
from benchmarks.training_peers import LARGE, REFERENCE, Job, matrix_product, mlx_lm, naive, pytorch
from mlxflow.device import cpu_backend


def _ours(job: Job = REFERENCE, **choices: Any) -> Callable[[str], None]:
    return partial(ours, variant=Variant(**choices), job=job)


# None of the peers measures or clips the gradient's norm, nor do ours but where it is said.
GPU_ROWS: dict[str, Callable[[str], None]] = {
    "matrix product, bf16": matrix_product,
    "mlx-lm trainer, bf16": mlx_lm,
    "naive: fp32, uncompiled, evaluated each step": naive,
    "PyTorch compiled, bf16": pytorch,
    "mlxflow bf16-pure": _ours(),
    "mlxflow bf16-pure, without kernels": _ours(kernels=False),
    "mlxflow bf16-pure, not deterministic": _ours(deterministic=False),
    "mlxflow bf16-pure, without kernels, not deterministic": _ours(kernels=False, deterministic=False),
    "mlxflow bf16-pure, documents of 200 apart": _ours(document_length=200),
    "mlxflow bf16-pure, documents of 200 apart, not deterministic": _ours(document_length=200, deterministic=False),
    "mlxflow bf16-pure, norm clipped": _ours(max_grad_norm=1.0),
    "mlxflow bf16-pure, limit 16.9 GB": _ours(limit_gb=16.9),
    "mlxflow bf16-pure, limit 16.5 GB": _ours(limit_gb=16.5),
    "mlxflow bf16-pure, fused loss, limit 16 GB": _ours(fused_loss=True, limit_gb=16),
    **{
        f"mlxflow bf16-pure, every layer checkpointed, fused loss, limit {limit} GB": _ours(
            checkpoint_every=1, fused_loss=True, limit_gb=limit
        )
        for limit in (7.0, 5.5, 4.5)
    },
    "mlxflow bf16 with fp32 masters": _ours(precision="bf16"),
    "mlxflow fp32": _ours(precision="fp32"),
    "1B: mlx-lm trainer, bf16": partial(mlx_lm, job=LARGE),
    "1B: PyTorch compiled, bf16": partial(pytorch, job=LARGE),
    "1B: mlxflow bf16-pure": _ours(LARGE),
    "1B: mlxflow bf16-pure, without kernels": _ours(LARGE, kernels=False),
    "1B: mlxflow bf16-pure, limit 45 GB": _ours(LARGE, limit_gb=45),
    "1B: mlxflow bf16-pure, fused loss, limit 45 GB": _ours(LARGE, fused_loss=True, limit_gb=45),
    # the most that fits in 16 GB: of these the one with the most rows in a pass whose peak is under it
    **{
        f"1B: mlxflow bf16-pure, {8 // passes} rows a pass, every layer checkpointed, fused loss, limit 15.5 GB": _ours(
            LARGE, grad_accum_steps=passes, checkpoint_every=1, fused_loss=True, limit_gb=15.5
        )
        for passes in (1, 2, 4, 8)
    },
}


def _cpu(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenize_corpus(Path(scratch))
        for _ in range(rounds):  # in turn: what else the machine does hits both
            for name, steps in STEPS_OF[CPU_LENGTH]:
                command = [sys.executable, __file__, name, str(folder)]
                subprocess.run(command, check=True, env={**os.environ, "STEPS": str(steps)})


def _gpu(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in GPU_ROWS]:
        sys.exit(f"no row {unknown[0]!r}; `python benchmarks/train.py rows` lists them")
    for name in names or GPU_ROWS:
        done = subprocess.run([sys.executable, __file__, "row", name], check=False)
        if done.returncode:
            print(json.dumps({"row": name, "failed": done.returncode}), flush=True)


def _main() -> None:
    match sys.argv[1:]:
        case ["row", name]:
            GPU_ROWS[name](name)
        case ["rows"]:
            print("\n".join(GPU_ROWS))
        case ["gpu", *names]:
            _gpu(names)
        case ["cpu-mlx-lm", folder]:
            train_by_mlx_lm(Path(folder))
        case ["cpu-mlxflow", folder]:
            train_by_mlxflow(Path(folder))
        case ["cpu", *rounds]:
            _cpu(int(rounds[0]) if rounds else 3)
        case _:
            print(__doc__)


if __name__ == "__main__":
    let_children_import_checkout()
    cpu_backend.prepare()
    _main()
