"""The page as a browser shows it."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxflow.report.render import render
from tests.report.runs import edit, read, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the interop extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

#: Opens a file and returns the page; anything on the console, and any request, is a failure.
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    contexts: list[Any] = []
    told: list[str] = []

    def open_(path: Path, *, width: int = 1200, **how: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **how))
        page = contexts[-1].new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: told.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert told == []


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    edit(root, "train", lambda report: report.update(steps=200))
    path = root / "index.html"
    path.write_bytes(render([read(root)]))
    return path


def test_every_plot_is_drawn(page_file: Path, show: Open) -> None:
    page = show(page_file)
    sizes = page.eval_on_selector_all(
        ".plot .line, .plot .dots, .graph:not(.tall) .box, .bars .bar, .stacked .bar",
        "all => all.map(one => [one.getBoundingClientRect().width, getComputedStyle(one).stroke, "
        "getComputedStyle(one).fill])",
    )
    assert len(sizes) > 30
    assert all(width > 0 and (stroke != "none" or fill != "none") for width, stroke, fill in sizes)


def test_the_value_under_the_pointer_is_shown(page_file: Path, show: Open) -> None:
    page = show(page_file)
    area = page.locator("#learning .area").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert page.locator("#tip").is_hidden()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 20)
    assert page.locator("#tip").inner_text().splitlines()[:2] == ["step 199", "training: 2.075"]
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_arrow_keys_move_from_point_to_point(page_file: Path, show: Open) -> None:
    page = show(page_file)
    page.locator("#learning .area").first.focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#tip").inner_text().startswith("step 2\n")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_zoom_applies_to_all_plots_of_a_kind_and_can_be_reset(page_file: Path, show: Open) -> None:
    page = show(page_file)

    def views(section: str) -> list[str]:
        found: list[str] = page.eval_on_selector_all(
            f"{section} .area", "all => all.map(one => one.getAttribute('viewBox').split(' ')[2])"
        )
        return found

    area = page.locator("#learning .area").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 50)
    page.mouse.up()
    assert len(views("#learning")) > 3
    assert all(float(width) == pytest.approx(500, abs=8) for width in views("#learning"))
    assert set(views("#memory")) == {"1000"}
    ticks = page.locator("#learning .x").first.locator("text").all_text_contents()
    assert all(50 <= float(tick) <= 150 for tick in ticks)
    area.dblclick()
    assert {float(width) for width in views("#learning")} == {1000}
    area.focus()
    page.keyboard.press("+")
    assert [float(width) for width in views("#learning")] == pytest.approx([500] * len(views("#learning")))
    page.keyboard.press("0")
    assert {float(width) for width in views("#learning")} == {1000}


def _contrast(page: Any, selector: str) -> float:
    """Return the contrast of an element's text with the page, as WCAG counts it."""
    ratio: float = page.evaluate(
        """selector => {
            const light = colour => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
                    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const style = getComputedStyle(document.querySelector(selector));
            const word = style.fill && selector.includes("text") ? style.fill : style.color;
            const pair = [light(word), light(getComputedStyle(document.body).backgroundColor)].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
        }""",
        selector,
    )
    return ratio


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(page_file: Path, show: Open, scheme: str) -> None:
    page = show(page_file, color_scheme=scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(back) > 200) == (scheme == "light")
    for selector in ("dd", "dt a", "nav a", ".legend li", ".plot .y text", "thead th", ".hint", ".bar-name"):
        assert _contrast(page, selector) >= 4.5, selector


@pytest.mark.parametrize("name", ["stage", "an_endless_name_without_a_break" * 40])
def test_the_page_fits_the_width_of_a_phone(tmp_path: Path, show: Open, name: str) -> None:
    write_run(tmp_path, name=name)
    path = tmp_path / "index.html"
    path.write_bytes(render([read(tmp_path, name=name)]))
    page = show(path, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.eval_on_selector_all(".plot, .bars, .answers, h1", "all => all.filter(e => e.scrollWidth > 390).length")
    assert wide == 0


def test_the_printed_page_is_dark_on_white_without_controls(page_file: Path, show: Open) -> None:
    page = show(page_file, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.locator("nav").is_hidden()
    assert page.locator("#learning .area").first.is_visible()


def test_hostile_names_execute_nothing_in_a_browser(tmp_path: Path, show: Open) -> None:
    name = "</script></svg><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\x00\u202e{{7*7}}\"'"
    write_run(tmp_path, name=name)
    path = tmp_path / "index.html"
    path.write_bytes(render([read(tmp_path, name=name)]))
    page = show(path)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert "<script>window.hacked=1</script>" in page.locator("h1").inner_text()


def test_a_page_with_100_000_points_opens_and_responds(long_page: Path, show: Open) -> None:
    page = show(long_page)
    page.locator("#memory .area").first.focus()
    page.keyboard.press("End")
    assert "step 99,999" in page.locator("#tip").inner_text()


def test_two_runs_fit_the_page_with_answers_side_by_side(page_file: Path, tmp_path: Path, show: Open) -> None:
    runs = [read(page_file.parent, label=label) for label in ("A: here", "B: there")]
    path = tmp_path / "compare.html"
    path.write_bytes(render(runs))
    page = show(path)
    assert page.evaluate("document.documentElement.scrollWidth") == 1200
    for line in page.locator("#answers .answers > div").all():
        left, right = (line.locator("dd").nth(index).bounding_box() for index in (0, 1))
        assert right["x"] >= left["x"] + left["width"]
        assert abs(left["y"] - right["y"]) < 2
    phone = show(path, width=390)
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    assert phone.locator("#answers dd:visible").first.inner_text().startswith("A: here")


def test_the_timelines_of_two_runs_are_zoomed_together(page_file: Path, tmp_path: Path, show: Open) -> None:
    path = tmp_path / "compare.html"
    path.write_bytes(render([read(page_file.parent, label=label) for label in ("A: here", "B: there")]))
    page = show(path)
    page.locator("#memory .area").first.focus()
    page.keyboard.press("+")
    widths = page.eval_on_selector_all(
        '#memory .plot[data-group="memory profile step"] .area',
        "all => all.map(one => Math.round(one.getAttribute('viewBox').split(' ')[2]))",
    )
    assert len(widths) >= 7  # the one of both runs, and three of each
    assert set(widths) == {500}


def test_the_phase_under_the_pointer_is_shown(page_file: Path, show: Open) -> None:
    page = show(page_file)
    area = page.locator("#memory figure", has_text="MLX's memory, sampled").locator(".area")
    area.focus()
    page.keyboard.press("End")
    said = page.locator("#tip").inner_text()
    assert said.splitlines() == ["seconds 19.9 s", "active: 2.004 MB", "in step", "in step/update: 2.4 MB at most"]
    sizes = area.locator(".band").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert len(sizes) == 4
    assert all(size > 0 for size in sizes)


def test_the_loss_is_smoothed_and_drawn_by_its_logarithm_and_back(page_file: Path, show: Open) -> None:
    page = show(page_file)
    figure = page.locator("figure[data-switches]")
    first = figure.locator(".line").first

    def drawn() -> tuple[Any, ...]:
        words = figure.locator(".y text").all_text_contents()
        return first.get_attribute("d"), words, figure.locator(".grid").get_attribute("d")

    before = drawn()
    figure.get_by_label("Smoothing").fill("0.9")
    assert figure.locator(".line.raw").first.get_attribute("d") == before[0]
    smooth = figure.locator(".line:not(.raw)").first.get_attribute("d")
    assert smooth.count("L") == before[0].count("L")
    assert smooth != before[0]
    figure.get_by_label("Smoothing").fill("0")
    assert drawn() == before
    figure.get_by_label("Logarithmic scale").check()
    heights = [float(point.split(" ")[1]) for point in first.get_attribute("d")[1:].split("L")]
    losses = page.evaluate("JSON.parse(document.querySelector('figure[data-switches] script').textContent).series[0].y")
    low, high = math.log(losses[-1]), math.log(losses[0])
    middle = len(losses) // 2
    expected = (high - math.log(losses[middle])) / (high - low)
    assert (heights[middle] - heights[0]) / (heights[-1] - heights[0]) == pytest.approx(expected, abs=2e-3)
    assert len(drawn()[1]) >= 3
    figure.get_by_label("Logarithmic scale").uncheck()
    assert drawn() == before


@pytest.mark.parametrize("width", [390, 1200])
def test_axis_labels_are_within_the_page_and_ticks_at_their_values(page_file: Path, show: Open, width: int) -> None:
    page = show(page_file, width=width)
    outside = page.eval_on_selector_all(
        "svg.x text, svg.y text",
        "(all, width) => all.map(e => [e.textContent, e.getBoundingClientRect()])"
        ".filter(([, box]) => box.width && (box.left < 0 || box.right > width)).map(([word]) => word)",
        width,
    )
    assert outside == []
    plot = page.locator("#data .bars")
    area, axis = plot.locator(".bar-area").bounding_box(), plot.locator(".x").bounding_box()
    assert (area["x"], area["width"]) == (axis["x"], axis["width"])
    ticks = {e.text_content(): e.bounding_box() for e in plot.locator(".x text").all()}
    median = plot.locator(".median").bounding_box()["x"]
    assert plot.locator(".bar-value").inner_text() == "5,349 median"
    assert ticks["1,000"]["x"] < median < ticks["10,000"]["x"] + ticks["10,000"]["width"]


def test_a_table_that_scrolls_has_an_edge_that_shows_it(page_file: Path, show: Open) -> None:
    page = show(page_file, width=390)
    scrolling = page.locator(".scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => getComputedStyle(e).backgroundImage)"
    )
    assert scrolling
    assert all(image.count("linear-gradient") == 4 for image in scrolling)


@pytest.mark.parametrize("count", [3, 6])
def test_many_runs_are_compared_on_one_page_in_every_width(
    page_file: Path, tmp_path: Path, show: Open, count: int
) -> None:
    path = tmp_path / "compare.html"
    labels = [f"{chr(ord('A') + number)}: a run" for number in range(count)]
    path.write_bytes(render([read(page_file.parent, label=label) for label in labels]))
    for width in (1200, 390):
        page = show(path, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("#answers .answers > div:not(.who)").first.locator("dd:visible").count() == count
    lines = page.locator("#learning figure[data-switches] .line").evaluate_all(
        "all => all.map(e => getComputedStyle(e).stroke)"
    )
    assert len(set(lines)) == count
