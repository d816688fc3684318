"""The process that verifies kernels, on the stand-in: what is verified is compared, and nothing is timed.

python -m tests.metal.verifier NAME...    takes what `python -m mlxflow.kernels.verification` does
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

from mlxflow.kernels import adamw, verification, verification_inputs
from tests.metal import stand_in


@contextmanager
def untimed() -> Iterator[None]:
    """Let every kernel be fast enough, and compare it with fewer numbers.

    On a CPU MLX's own sum of squares is less exact than the kernel, which is compared with float64 instead.
    """
    with (
        mock.patch.object(verification, "_time", return_value=(1.0, 2.0)),
        mock.patch.object(verification, "_CHECKED", 1 << 14),
        mock.patch.object(verification_inputs, "_TABLE_ROWS", 300),
        mock.patch.object(adamw, "reference_sum_of_squares", _sum_of_squares),
    ):
        yield


def _sum_of_squares(x: mx.array) -> mx.array:
    return mx.array(np.square(np.array(x.astype(mx.float32)), dtype=np.float64).sum(), mx.float32)


if __name__ == "__main__":
    with stand_in.metal(), untimed():
        verification.main(sys.argv[1:])
