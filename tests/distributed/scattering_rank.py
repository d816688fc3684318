"""A rank of ring with a reduce-scatter, which ring lacks: `python scattering_rank.py MARKER run STAGE ...`.

It takes the rank's row of the backend's sum, and writes the file MARKER when it was asked for one.
"""

import sys
from pathlib import Path

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # noqa: E402

from mlxflow.__main__ import main  # noqa: E402
from mlxflow.distributed import team  # noqa: E402
from mlxflow.training import gradient_packing, sharded_layers  # noqa: E402
from mlxflow.workflow import ranks  # noqa: E402

marker, *arguments = sys.argv[1:]


def sum_scatter(rows: mx.array, *, group: mx.distributed.Group, stream: mx.Stream) -> mx.array:
    """Return this rank's row of the sum."""
    Path(marker).touch()
    with mx.stream(stream):
        return mx.distributed.all_sum(rows, group=group, stream=stream)[group.rank() : group.rank() + 1]


sharded_layers._FEW = 1
gradient_packing._FEW = 1 << 10  # else a small model is sent in one piece
for module in (team, ranks):
    module.SCATTERING = ("ring",)  # type: ignore[attr-defined]
mx.distributed.sum_scatter = sum_scatter  # type: ignore[assignment]
sys.exit(main(arguments))
