"""Two ranks of a ring, of which rank 1 ends after its first exchange: `python lost_peer.py KIND`; rank 0 prints.

KIND is what rank 0 waits for then: "numbers", or "gradients", which it takes for granted until its next exchange.
"""

import os
import sys

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # noqa: E402

from mlxflow.distributed import reduction  # noqa: E402
from mlxflow.distributed.rank import Rank  # noqa: E402
from mlxflow.distributed.team import Team  # noqa: E402

number = int(os.environ["MLX_RANK"])
team = Team(Rank(number, 2, "ring", "ordered"), mx.distributed.init(strict=True, backend="ring"))
found = team.exchange("first", [7])
if number == 1:
    os._exit(0)
print(found.tolist())
try:
    if sys.argv[1] == "gradients":
        sums = reduction.added_in_rank_order(reduction.gather_pieces(team, mx.ones(1000)), count=2)
        mx.async_eval(sums)
    print("wrong:", team.exchange("first", [7]).tolist())
except RuntimeError as error:
    print(error)
