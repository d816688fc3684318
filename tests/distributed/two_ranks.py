"""Run a script on two ranks of a ring."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mlxflow.distributed.rank_start import free_ports

_SECONDS = 120


def outputs_of(script: str, argument: str, folder: Path) -> list[str]:
    """Return what the two ranks print; both have ended afterwards.

    Args:
        script: file beside this one.
        argument: of the script.
        folder: for the file of hosts.
    """
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), argument],
            env=os.environ | {"MLX_RANK": str(number), "MLX_HOSTFILE": str(folder / "hosts.json")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        return [rank.communicate(timeout=_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
