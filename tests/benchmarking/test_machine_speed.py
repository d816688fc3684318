from typing import Any

import mlx.core as mx
import pytest

from mlxflow.benchmarking import machine_speed


def test_fixed_work_evaluates_the_same_amount_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    evaluate = mx.eval

    def counted(*arrays: Any) -> None:
        sizes.append(sum(array.size for array in arrays))
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    work = machine_speed.fixed_work()
    sizes.clear()
    work()
    work()
    side = machine_speed._PRODUCT["cpu" if mx.default_device() == mx.cpu else "gpu"]
    assert sizes == [side**2 + 1] * 2
