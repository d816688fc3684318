from mlxflow.report import charts


def test_bars_are_as_long_as_their_values_with_intervals_at_their_ends() -> None:
    drawn = charts.bars([charts.Bar("a", 50, 40, 60, "c0"), charts.Bar("b", 100, None, None)], label="bars")
    assert 'width="50%"' in drawn
    assert 'x1="40%" x2="60%"' in drawn
    assert 'width="100%"' in drawn
    assert "a: 50 (40 to 60)" in drawn
