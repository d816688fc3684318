import numpy as np
import pytest
from markupsafe import Markup

from mlxflow.report import svg


def test_thinning_keeps_every_buckets_peak_and_both_ends() -> None:
    random = np.random.default_rng(0)
    y = random.normal(size=100_000)
    y[[137, 54_321, 99_998]] = 50, -70, 60
    x, thinned = svg.thin(np.arange(100_000.0), y)
    assert {50, -70, 60} <= set(thinned.tolist())
    assert (x[0], x[-1]) == (0, 99_999)
    assert len(x) <= 2 * svg.BUCKETS + 2
    assert (np.diff(x) > 0).all()
    assert (y[x.astype(int)] == thinned).all()


def test_a_short_series_loses_only_its_non_finite_points() -> None:
    x, y = svg.thin(np.arange(4.0), np.array([1.0, np.nan, np.inf, 2.0]))
    assert (x.tolist(), y.tolist()) == ([0, 3], [1, 2])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (471.2, 79.8 * 20), (1e-9, 2e-9), (-5.0, 5.0), (0.0, 9e12)])
def test_ticks_are_round_and_within_the_ends(low: float, high: float) -> None:
    for scale in (svg.Scale(low, high), *([svg.Scale(low, high, True)] if low > 0 else [])):
        ticks = scale.ticks(5)
        assert 2 <= len(ticks) <= 12
        assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_text_in_an_element_is_escaped_and_markup_is_kept() -> None:
    made = svg.tag("text", {"x": 1.005, "data-title": '"<&'}, "</text><script>", Markup("<b>bold</b>"))
    assert made == '<text x="1" data-title="&#34;&lt;&amp;">&lt;/text&gt;&lt;script&gt;<b>bold</b></text>'
