import pytest

from mlxflow.messages.byte_sizes import show_bytes


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (20_221_000_000, "20 GB"),
        (10e9, "10 GB"),
        (8e9, "8.00 GB"),
        (0.1e9, "0.10 GB"),
        (40_100_000, "40.1 MB"),
        (48_200, "48.2 kB"),
        (512, "512 bytes"),
        (0, "0 bytes"),
    ],
)
def test_bytes_are_shown_in_a_unit_in_which_they_have_digits(num_bytes: float, shown: str) -> None:
    assert show_bytes(num_bytes) == shown
