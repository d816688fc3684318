"""The log format of wandb's files."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from mlxflow.tracking.wandb_files import records

_BLOCK = 32768


def _written(contents: list[bytes]) -> bytes:
    """Return a file with records, as wandb's store and LevelDB write them."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for content in contents:
        is_first = True
        while True:
            left = _BLOCK - len(data) % _BLOCK
            if left < 7:
                data += bytes(left)
                left = _BLOCK
            part, content = content[: left - 7], content[left - 7 :]
            kind = (1 if is_first else 4) if not content else (2 if is_first else 3)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            is_first = False
            if not content:
                break
    return bytes(data)


@given(st.lists(st.integers(0, 100_000), max_size=8))
def test_records_of_any_length_are_read_over_the_borders_of_blocks(lengths: list[int]) -> None:
    contents = [bytes([number % 251]) * length for number, length in enumerate(lengths)]
    assert list(records(_written(contents))) == contents


@given(st.integers(0, 70_000))
def test_a_file_that_is_cut_anywhere_has_its_whole_records(size: int) -> None:
    contents = [bytes([number]) * 1000 * number for number in range(11)]
    found = list(records(_written(contents)[:size]))
    assert found == contents[: len(found)]


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(data: bytes) -> None:
    assert list(records(data)) is not None
