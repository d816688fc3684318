import math

import pytest

from mlxflow.report import formatting


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (7439032, "7,439,032"),
        (38.543, "38.5"),
        (0.0123456, "0.0123"),
        (1e-7, "1.00e-07"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits_and_thousands_apart(value: float, shown: str) -> None:
    assert formatting.show(value) == shown


@pytest.mark.parametrize("value", [None, "12", True, math.nan, math.inf, [1], 10**400])
def test_a_non_number_is_shown_as_unknown(value: object) -> None:
    assert {
        formatting.show(value),
        formatting.show_bytes(value),
        formatting.show_seconds(value),
        formatting.show_percent(value),
    } == {"—"}


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1.00 MB"), (2_749_794, "2.75 MB"), (8e9, "8 GB"), (-1500, "-1.50 kB")],
)
def test_bytes_are_shown_in_a_suitable_unit(size: float, shown: str) -> None:
    assert formatting.show_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.0042, "4.20 ms"), (0.00001, "10 µs"), (33, "33 s"), (125.4, "2 min 05 s"), (7260, "2 h 01 min")],
)
def test_durations_are_shown_in_a_suitable_unit(seconds: float, shown: str) -> None:
    assert formatting.show_seconds(seconds) == shown


def test_a_figure_has_the_digits_that_its_error_justifies() -> None:
    assert formatting.show_interval(79.7164, 3.0264) == "79.7 ± 3.0"
    assert formatting.show_interval(1234.5678, 0.0123) == "1,234.568 ± 0.012"
    assert formatting.show_interval(79.7164, None) == "79.72"


def test_characters_not_allowed_in_html_are_replaced() -> None:
    assert formatting.clean("a\x00b\u202ec\ud800d\te\nf") == "a�b�c�d\te\nf"


def test_a_long_name_keeps_both_ends() -> None:
    assert formatting.shorten("model.layers.0.self_attn.q_proj", 12) == "model.…_proj"
    assert formatting.shorten("short", 12) == "short"
