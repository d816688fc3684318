"""A rank with a fault of the test's choice: `python faulty_rank.py FAULT MARKER run STAGE ...`.

Every fault strikes rank 1 in its third forward pass, and only while the file MARKER does not exist.
"""

import sys
from pathlib import Path
from typing import Any

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # noqa: E402

from mlxflow.__main__ import main  # noqa: E402
from mlxflow.distributed.rank import of_this_process  # noqa: E402
from mlxflow.training.step import Step  # noqa: E402

fault, marker, *arguments = sys.argv[1:]
computed = 0
compute = Step.compute


def faulty(step: Step, tokens: mx.array, marks: mx.array) -> Any:
    """Compute the gradients of a batch, or fail."""
    global computed
    computed += 1
    strikes = computed >= 3 and of_this_process().number == 1 and not Path(marker).exists()
    if strikes and fault == "memory":
        Path(marker).touch()
        raise RuntimeError("[malloc] Unable to allocate 123456 bytes.")
    if strikes and fault == "raises":
        Path(marker).touch()
        raise ValueError("an odd number")
    if strikes and fault == "weights":
        Path(marker).touch()
        weights = step.state[1]["weights"]
        name = sorted(weights)[0]
        weights[name] = weights[name] * (1 + 1e-6)
        step.publish()
    return compute(step, tokens, marks)


Step.compute = faulty  # type: ignore[method-assign,assignment]
sys.exit(main(arguments))
