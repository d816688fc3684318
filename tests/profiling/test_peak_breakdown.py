import msgspec
import pytest

from mlxflow.profiling.peak_breakdown import StepBytes, compose
from tests.profiling.test_step_memory import ARRAYS


def test_compose_of_a_peak_in_the_update_has_no_logits() -> None:
    parts = compose(
        StepBytes(10, 10, 10, 10),
        logits_bytes=10,
        peak_memory_bytes=55,
        reserved_bytes=58,
        process_bytes=65,
        lies_in_update=True,
    )
    assert (parts.logits_bytes, parts.activations_bytes, parts.update_bytes) == (0, 0, 15)
    assert (parts.cache_bytes, parts.other_bytes, parts.total_bytes) == (3, 7, 65)


@pytest.mark.parametrize("lies_in_update", [False, True])
@pytest.mark.parametrize("process_bytes", [0, 30, 55, 65])
@pytest.mark.parametrize("reserved_bytes", [20, 55, 60])
@pytest.mark.parametrize("known", [1, 10, 100])
def test_compose_returns_parts_that_add_up_to_the_peak(
    known: int, reserved_bytes: int, process_bytes: int, *, lies_in_update: bool
) -> None:
    parts = compose(
        StepBytes(known, known, known, known),
        logits_bytes=known,
        peak_memory_bytes=55,
        reserved_bytes=reserved_bytes,
        process_bytes=process_bytes,
        lies_in_update=lies_in_update,
    )
    sizes = msgspec.structs.asdict(parts)
    assert min(sizes.values()) >= 0
    assert sum(sizes[f"{name}_bytes"] for name in ARRAYS) == 55
    assert sizes.pop("total_bytes") == sum(sizes.values()) == max(55, reserved_bytes, process_bytes)
