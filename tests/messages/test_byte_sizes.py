import pytest

from mlxflow.messages.byte_sizes import show_apart, show_bytes


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (1_234e9, "1,234 GB"),
        (99.96e9, "100 GB"),
        (99.94e9, "99.9 GB"),
        (20_221_000_000, "20.2 GB"),
        (9_999_000_000, "10.0 GB"),
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


def test_two_numbers_that_would_be_shown_alike_are_shown_in_full() -> None:
    assert show_apart(20_450_000_000, 20_200_000_000) == ("20.4 GB", "20.2 GB")
    assert show_apart(1_000_000_001, 1_000_000_000) == ("1,000,000,001 bytes", "1,000,000,000 bytes")
    assert show_apart(1_000_000_000, 1_000_000_000) == ("1.00 GB", "1.00 GB")
