from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.evaluation import slices
from mlxflow.evaluation.slices import positions_at_once, rows_at_once

DEVICE = "cpu" if mx.default_device() == mx.cpu else "gpu"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """MLX's memory limit, to be changed."""
    found = [1 << 40]
    monkeypatch.setattr(mx, "get_memory_limit", lambda: found[0])
    return found


def test_positions_per_slice_are_bounded_by_slice_size_and_memory_limit(limit: list[int]) -> None:
    assert positions_at_once(1024, arrays=2) == slices._SLICE_BYTES[DEVICE] // (4 * 1024 * 2)
    limit[0] = 16 * 4 * 1024 * 2 * 5
    assert positions_at_once(1024, arrays=2) == 5
    limit[0] = 1
    assert positions_at_once(1024, arrays=2) == 1


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.layer = nn.Linear(64, 256)
        self.args = SimpleNamespace(num_attention_heads=num_heads)


def test_rows_per_slice_follow_from_widths_heads_and_memory_limit(limit: list[int]) -> None:
    few, many = _Model(1), _Model(100)
    bounded = slices._BODY_BYTES[DEVICE] // (4 * 128 * (8 * 256 + 3 * 128))
    assert rows_at_once(few, context_length=128, most=1 << 20) == bounded
    assert rows_at_once(few, context_length=128, most=64) == 64
    limit[0] = 8 * 4 * 128 * (8 * 256 + 3 * 128) * 7
    assert rows_at_once(few, context_length=128, most=64) == 7
    assert rows_at_once(many, context_length=128, most=64) < 7
    assert rows_at_once(few, context_length=128, most=64, logits=10**6) == 1
