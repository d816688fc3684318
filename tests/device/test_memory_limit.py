import mlx.core as mx
import pytest

from mlxflow.device import memory_limit


def test_a_block_lowers_the_limit_of_mlx_and_not_what_is_allowed() -> None:
    before = mx.get_memory_limit()
    with memory_limit.lowered() as lower:
        for threshold, expected in ((5000, 5000), (6000, 6000), (2 * before, before)):
            lower(threshold)
            assert mx.get_memory_limit() == expected
            assert memory_limit.allowed_bytes() == before
        with memory_limit.lowered() as lower_more:
            lower_more(4000)
            assert memory_limit.allowed_bytes() == before
    assert mx.get_memory_limit() == memory_limit.allowed_bytes() == before


def _fail() -> None:
    with memory_limit.lowered() as lower:
        lower(5000)
        raise ValueError


def test_the_limit_is_as_before_after_an_error() -> None:
    before = mx.get_memory_limit()
    with pytest.raises(ValueError):  # noqa: PT011 - raised above
        _fail()
    assert mx.get_memory_limit() == memory_limit.allowed_bytes() == before
