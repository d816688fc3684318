import json
import re
from pathlib import Path

import pytest

from mlxflow.report.render import render
from tests.report.runs import read


def test_phases_are_bands_over_the_timeline_with_their_peaks(root: Path) -> None:
    page = render([read(root)]).decode()
    sampled = page.partition("<figcaption>MLX&#39;s memory, sampled")[2].partition("</figure>")[0]
    told = json.loads(re.search(r"<script[^>]*>(.*?)</script>", sampled)[1])["bands"]  # type: ignore[index]
    assert told[0] == ["load_model", 0, 1, 3_000_000]
    assert ["step", 1, 1.1, 0] in told  # its parts have the heights
    assert ["step/update", 1.08, 1.1, 2_400_000] in told
    assert sampled.count('class="band bar') == len({name.rpartition("/")[2] for name, *_ in told})
    by_step = page.partition("<figcaption>MLX&#39;s memory, at each step&#39;s end")[2].partition("</figure>")[0]
    assert "peak in forward_backward" in by_step
    assert "peak in load_model" not in by_step


@pytest.mark.matrix
def test_very_many_phases_are_merged_into_few_bands(long_page: Path) -> None:
    page = long_page.read_text()
    sampled = page.partition("<figcaption>MLX&#39;s memory, sampled")[2].partition("</figure>")[0]
    told = json.loads(re.search(r"<script[^>]*>(.*?)</script>", sampled)[1])["bands"]  # type: ignore[index]
    assert len(told) < 500
    counts = [
        int(name.removeprefix("step, ").removesuffix(" times").replace(",", "")) for name, *_ in told if "times" in name
    ]
    assert sum(counts) == 100_000
    assert max(value for *_, value in told) == 9_000_000
