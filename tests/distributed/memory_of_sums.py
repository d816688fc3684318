"""One of two ranks of a ring, which sums arrays and prints the most memory in use: `python memory_of_sums.py KIND`.

KIND is "fast" or "ordered". The memory is counted in the bytes of all arrays in bf16, and begins with them.
"""

import os
import sys
from typing import Any, cast

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # noqa: E402

from mlxflow.distributed.rank import Rank  # noqa: E402
from mlxflow.distributed.team import Team  # noqa: E402
from mlxflow.training.rank_step import RankStep  # noqa: E402

NUMBERS = 1 << 18


class _Step:
    """Of a model whose gradients are such arrays."""

    shards = None
    names = tuple("abcdefgh")

    def compiled(self, function: Any) -> Any:
        return function

    def pack(self, gradients: Any) -> Any:
        return gradients

    unpack = pack


mx.async_eval = mx.eval  # what is in use does not depend on how far the host runs ahead
rank = Rank(int(os.environ["MLX_RANK"]), 2, "ring", sys.argv[1])
team = Team(rank, mx.distributed.init(strict=True, backend="ring"))
rank_step = RankStep(cast("Any", _Step()), cast("Any", _Step()), team)
mine = [mx.full((NUMBERS,), rank.number + place, mx.bfloat16) for place in range(len(_Step.names))]
mx.eval(mine)
before = mx.get_active_memory()
mx.reset_peak_memory()
sums = rank_step.sum_fast(mine) if rank.reduction == "fast" else rank_step.add_in_rank_order(None, mine, 2)
mx.eval(sums)
numbers = [float(piece.max()) for pieces in sums for piece in pieces]
print(numbers, (mx.get_peak_memory() - before) / (len(_Step.names) * 2 * NUMBERS) + 1)
