"""Let two ranks of NCCL share a GPU: each has a host's name of its own, and they exchange over loopback.

NCCL refuses two ranks of one host on one GPU. Python imports this module at its start if its folder is in PYTHONPATH.
"""

import os

_RANK = os.environ.get("MLX_RANK")

if _RANK is not None:
    os.environ["NCCL_HOSTID"] = f"rank {_RANK}"
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["SHARED_GPU"]
