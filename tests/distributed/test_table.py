import re

import pytest

from mlxflow.distributed.table import Distributed, parse_duration


@pytest.mark.parametrize(("text", "seconds"), [("90 s", 90), ("10 min", 600), (" 1.5h ", 5400), ("0.5 s", 0.5)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert Distributed(step_timeout=text).timeout_seconds == seconds


def test_a_text_that_is_no_duration_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("'10' is no duration such as '90 s' or '10 min'")):
        parse_duration("10")
