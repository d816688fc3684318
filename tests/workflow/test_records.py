import math
from typing import Any

import pytest

from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.records import are_settings, check_values, is_complete, read_values

RECORD: dict[str, Any] = {
    "settings": {"version": 1, "config": {"betas": [0.9, 0.999]}},
    "inputs": {"notes/a.txt": "12ab"},
    "outputs": {"model.safetensors": [100, "34cd"]},
    "seconds": 1.5,
}


def test_a_complete_record_is_read_without_unknown_fields() -> None:
    assert read_values(RECORD | {"more": 1}) == RECORD
    assert read_values(RECORD | {"threads": 2, "device": "cpu"}) == RECORD | {"threads": 2, "device": "cpu"}
    assert is_complete(RECORD)
    assert not is_complete({"settings": {}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": []}, "settings: expected a table of settings"),
        ({"inputs": {"a": "xyz"}}, "inputs: expected a digest for each name"),
        ({"inputs": {"a": "1" * 65}}, "inputs: expected a digest for each name"),
        ({"outputs": {}}, "outputs: expected [bytes, digest] for each name"),
        ({"outputs": {"a": [-1, "12"]}}, "outputs: expected [bytes, digest] for each name"),
        ({"outputs": {"a": [True, "12"]}}, "outputs: expected [bytes, digest] for each name"),
        ({"seconds": -1}, "seconds: expected a number of seconds"),
        ({"seconds": math.inf}, "seconds: expected a number of seconds"),
        ({"threads": 0}, "threads: expected a number of threads"),
        ({"device": 1}, "device: expected text"),
    ],
)
def test_an_invalid_field_is_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidStateError) as caught:
        check_values(RECORD | change)
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", ["settings", "inputs"])
def test_a_record_with_outputs_has_every_required_field(name: str) -> None:
    lacking = {key: value for key, value in RECORD.items() if key != name}
    with pytest.raises(InvalidStateError, match=f"{name}: missing"):
        check_values(lacking)
    del lacking["outputs"]
    check_values(lacking)  # forgotten, or of an earlier version
    with pytest.raises(InvalidStateError, match="outputs: missing"):
        read_values(lacking)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, "b", {"c": True}], "d": math.inf}, True),
        ({"a": math.nan}, False),
        ({"a": None}, False),
        ({"a": 2**64}, False),
        ([1], False),
    ],
)
def test_are_settings(value: object, expected: bool) -> None:
    assert are_settings(value) is expected


def test_settings_nested_too_deeply_are_none() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    assert not are_settings({"a": deep})
