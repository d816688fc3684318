from mlxflow.report import charts


def test_bars_are_as_long_as_their_values_with_intervals_at_their_ends() -> None:
    drawn = charts.bars([charts.Bar("a", 50, 40, 60, "c0"), charts.Bar("b", 100, None, None)], label="bars")
    assert 'width="50%"' in drawn
    assert 'x1="40%" x2="60%"' in drawn
    assert 'width="100%"' in drawn
    assert "a: 50 (40 to 60)" in drawn


def test_differences_are_placed_around_zero() -> None:
    rows = [charts.DifferenceBar("a", -0.05, -0.10, 0.0), charts.DifferenceBar("b", 0.05, 0.0, 0.10)]
    drawn = charts.differences(rows, label="differences")
    assert drawn.count('class="marker" x1="50%" x2="50%"') == 2
    assert "a: -5.0 (-10.0 to +0.0)" in drawn
    assert ">0</text>" in drawn
    assert ">+10</text>" in drawn
