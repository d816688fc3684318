"""Every series of a plot can be told from every other, in light and in dark."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from mlxflow.report import colors
from mlxflow.report.render import render
from tests.report.runs import edit, read

_CSS = (Path(colors.__file__).parent / "templates/page.css").read_text()
_PALETTES = [dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", root)) for root in re.findall(r":root \{.*?\}", _CSS, re.S)]


def _linear(color: str) -> list[float]:
    if len(color) == 4:
        color = "#" + "".join(2 * digit for digit in color[1:])
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def _luminance(color: str) -> float:
    red, green, blue = _linear(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _oklab(color: str) -> tuple[float, float, float]:
    """Return a color as Ottosson's Oklab has it, in which distances are what an eye sees."""
    red, green, blue = _linear(color)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def test_each_of_many_series_has_a_style_of_its_own_that_the_page_knows() -> None:
    styles = [colors.style_of(index) for index in range(colors.STYLES)]
    assert len(set(styles)) == colors.STYLES > 11
    for name in {name for style in styles for name in style.split()}:
        kinds = (".line", ".dots", ".bar", ".key") if name != "p2" else (".line", ".bar", ".key")
        for kind in kinds:
            assert re.search(rf"\{kind}[a-z.]*\.{name}\b", _CSS), f"{kind}.{name}"


@pytest.mark.parametrize("palette", _PALETTES, ids=["light", "dark", "print"])
def test_colors_stand_out_from_the_page_and_from_one_another(palette: dict[str, str]) -> None:
    colors = [palette[f"c{number}"] for number in range(8)]
    for color in colors:
        low, high = sorted((_luminance(color), _luminance(palette["back"])))
        assert (high + 0.05) / (low + 0.05) >= 3, f"{color}: WCAG asks for 3 of what is drawn"
    for one, other in itertools.combinations(colors, 2):
        distance = sum((a - b) ** 2 for a, b in zip(_oklab(one), _oklab(other), strict=True)) ** 0.5
        assert distance > 0.08, (one, other)


def _styles(page: str, name: str) -> set[str]:
    """Return the colors of everything of a name in the legends and plots of a page."""
    keys = re.findall(rf'<span class="key (c\d)[^"]*"></span><bdi>{re.escape(name)}(?: [\d.]+ [KMG]?B)?</bdi>', page)
    series = re.findall(rf'"name":"{re.escape(name)}","style":"(c\d)', page)
    bars = re.findall(rf'<bdi>{re.escape(name)}</bdi></div><svg class="bar-area"[^>]*><rect class="bar (c\d)', page)
    return {*keys, *series, *bars}


def test_a_thing_has_one_color_on_every_plot(root: Path) -> None:
    def name_models(report: dict[str, Any]) -> None:
        (row,) = report["models"]
        report["models"] = [row | {"model": task} for task in ("train", "quantize:q4", "quantize:q8")]

    edit(root, "benchmark", name_models)
    page = render([read(root)]).decode()
    models = [_styles(page, task) for task in ("train", "quantize:q4", "quantize:q8")]
    assert models == [{"c0"}, {"c1"}, {"c2"}]
    for name in ("training", "held-out", "active", "peak", "cache", "weights", "update", "activations", "logits"):
        assert _styles(page, name) == {colors.style_of_thing(name)}, name
