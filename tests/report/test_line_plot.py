import numpy as np

from mlxflow.report import line_plot


def test_labels_of_close_ticks_do_not_overlap() -> None:
    drawn = line_plot.lines(
        [line_plot.Series("a", np.arange(3.0), 612_000_000 + np.arange(3.0) * 500, "c0")],
        line_plot.Axes("step", "bytes"),
        label="a",
    )
    axis = drawn.partition('class="area"')[0]
    words = [part.partition("</text>")[0].rpartition(">")[2] for part in axis.split("<text")[1:]]
    assert len(set(words)) == len(words) > 2
