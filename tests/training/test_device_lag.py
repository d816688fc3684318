"""Which buffers a device holds while the host is ahead of it; every case is small enough to count by hand."""

import pytest

from mlxflow.ops.graph_trace import Operation, Value
from mlxflow.training.device_lag import Ahead, BatchesAhead, Buffer, Lag, Sent

_LARGE = 1 << 20


def _freed(lag: Lag, sent: list[Sent]) -> list[int]:
    """Return how many buffers are free before each operation is sent, and before one more."""
    free: list[Buffer] = []
    device = lag.device(free.append)
    counts = []
    for one in sent:
        device.finish_early_ones()
        counts.append(len(free))
        device.send(one)
    device.finish_early_ones()
    assert all(buffer.uses == 1 for one in sent for buffer in one.buffers)  # they are counted down by the memory
    return [*counts, len(free)]


def _sent(name: str = "Matmul", *, elements: int = 1, inputs: int = 1, size: int = _LARGE) -> Sent:
    operation = Operation(name, "", ("x",) * inputs, (Value("y", (size,), 4),))
    return Sent(operation, name == "Reshape", elements, [Buffer(4)])


def test_a_cpu_frees_the_inputs_of_each_operation() -> None:
    assert _freed(Ahead(0), [_sent() for _ in range(3)]) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ahead", "counts"), [(0, [0, 0, 0, 3, 3, 3, 6]), (1, [0, 0, 0, 0, 0, 0, 3])])
def test_a_gpu_frees_the_inputs_of_a_whole_batch(ahead: int, counts: list[int]) -> None:
    assert _freed(BatchesAhead(2, 100, ahead), [_sent() for _ in range(6)]) == counts


def test_the_inputs_of_a_view_are_held_by_the_batch_but_it_is_no_operation_of_it() -> None:
    sent = [_sent("Reshape") for _ in range(4)] + [_sent(), _sent()]
    assert _freed(BatchesAhead(1, 100, 0), sent) == [0, 0, 0, 0, 0, 0, 6]


def test_a_batch_is_complete_when_its_inputs_have_many_numbers() -> None:
    assert _freed(BatchesAhead(9, 100, 0), [_sent(elements=50), _sent(elements=50), _sent()]) == [0, 0, 2, 2]


def test_small_results_are_waited_for_like_others_on_a_gpu() -> None:
    assert _freed(Ahead(100), [_sent(size=1), _sent(size=1)])[-1] == 2
    assert _freed(BatchesAhead(9, 100, 10), [_sent(size=1), _sent(size=1)])[-1] == 0


def test_a_concatenation_has_a_node_for_each_copy_and_one_that_joins_them() -> None:
    assert _freed(BatchesAhead(3, 100, 0), [_sent("Concatenate", inputs=2)])[-1] == 0
    assert _freed(BatchesAhead(3, 100, 0), [_sent("Concatenate", inputs=3)])[-1] == 1
