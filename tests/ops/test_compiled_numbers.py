import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.ops import compiled_numbers

_UPDATES = """
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlxflow.training.optimizers import make_optimizer, make_schedule
from mlxflow.training.update import Update

mx.set_default_device(mx.cpu)
for learning_rate, final, warmup, steps, norm in ((0.1, 0.0, 1, 9, 1.0), (0.2, 0.05, 3, 8, 0.7)):
    model = nn.Linear(16, 16)
    schedule = make_schedule(
        name="cosine",
        learning_rate=learning_rate,
        final_learning_rate=final,
        num_steps=steps,
        warmup_steps=warmup,
        decay_steps=1,
    )
    optimizer = make_optimizer(name="adamw", schedule=schedule, weight_decay=0.1, options={})
    update = Update(model, optimizer, max_grad_norm=norm, has_masters=False)
    state = [model.state, update.state]
    compiled = mx.compile(update, inputs=state, outputs=state)
    gradients = update.join({"weight": mx.ones((16, 16)), "bias": mx.ones(16)})
    mx.eval(compiled(mx.array(1.0), mx.array(1.0), gradients), state)
    print(len(list(Path(sys.argv[1]).rglob("*.cpp"))))
"""


def test_numbers_are_scalars_of_fp32() -> None:
    numbers = compiled_numbers.as_arrays(0.1, 3)
    assert [(number.shape, number.dtype, number.item()) for number in numbers] == [
        ((), mx.float32, pytest.approx(0.1)),
        ((), mx.float32, 3.0),
    ]


def test_mlx_compiles_nothing_anew_for_another_learning_rate_schedule_length_or_norm(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _UPDATES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 2, done.stderr
    assert counts[0] == counts[1] > 0
