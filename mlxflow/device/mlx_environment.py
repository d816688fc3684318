"""The environment variables of MLX on a Mac, set before MLX is imported and inherited by child processes."""

import os
import sys

from mlxflow.device import developer_tools

# By its presence MLX runs uncompiled, and looks for no compiler
_NO_COMPILING = "MLX_DISABLE_COMPILE"

# Whether products of fp32 arrays may be computed in TF32, with 10 bits of mantissa
_TF32 = "MLX_ENABLE_TF32"


def prepare() -> None:
    """Prepare MLX on macOS; elsewhere do nothing.

    MLX asks `g++` for its version before it compiles anything, for the GPU too. Where `g++` is a stand-in that opens a
    window, MLX runs uncompiled, as it does without one.

    An M5 computes products of fp32 arrays in TF32 from macOS 26.2 on, and other Macs do not: `precision = "fp32"` is
    fp32 on all of them, unless the user set the variable.
    """
    if sys.platform != "darwin":
        return
    if developer_tools.find("g++") is None:
        os.environ[_NO_COMPILING] = "1"
    os.environ.setdefault(_TF32, "0")
