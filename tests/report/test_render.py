import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from tests.report.pages import Seen, text_of
from tests.report.runs import TASKS, edit, read, training_row, write_run

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "\"'><img src=x onerror=window.hacked=1>",
    "{{ 7*7 }}{% raw %}",
    "<!-- ]]> </svg></title></style>",
    "long name " * 400,
    "\u202eright to left \u05d0\u05d1\u05d2 \u0627\u0644\u0639",
    "nul \x00 bell \x07 tab \t",
)


def test_every_section_shows_what_its_stage_reported(root: Path) -> None:
    page = render([read(root)])
    text = Seen(page).text
    for words in (
        "Tokens in a document",
        "documents cut into several rows 9",
        "Records that could not be read",
        "Loss, in nats a token",
        "Bits of a weight's code, by layer",
        "Relative error, by layer",
        "MLX's memory, at each step's end",
        "The process's memory, sampled",
        "What the 12 MB at the peak are made of: 9 MB of MLX's arrays, 3 MB beside them",
        "MLX's limits: 3 GB of arrays, 2 GB of freed buffers kept.",
        "Peak memory by phase",
        "What would save memory, most first",
        "Training: tokens learned from, per second, with intervals",
        "Loss over tokens",
        "To a loss of 2.20 it took stage 30 tokens and 3 s.",
        "Where a step's time goes",
        "Training computes: 10 of 40 GFLOP/s, 25.0 %",
        "stage and on",
        "Machine and versions",
        "mlxflow.lock: what each stage was made of",
    ):
        assert words in text
    assert "9 MB in stage, step 66" in text  # the peak that is pointed out
    assert 'class="note"' not in page.decode()


def test_an_empty_run_is_a_page_that_says_so(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    assert "0 of 6 stages built" in text
    for words in ("No corpus to show", "No learning curve to show", "No memory profile", "No benchmark to show"):
        assert words in text
    assert "mlxflow.lock is missing" in text
    assert Seen(render([read_run(tmp_path, [], name="nothing")])).text.startswith("nothing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.pop("phases"), "phases: missing"),
        (lambda report: report.update(arrays=3), "arrays: unknown key"),
        (lambda report: report.update(composition=[1]), "composition: expected `object`, got `array`"),
        (
            lambda report: report["leak"].update(bytes_per_step=float("nan")),
            "leak.bytes_per_step = nan: expected a finite number",
        ),
        (lambda report: report["settings"].pop("schedule"), "settings.schedule: missing"),
    ],
)
def test_a_malformed_report_counts_as_missing_and_is_named(
    root: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(root, "profile", change)
    line = f"artifacts/profile/report.toml: {said}. Run: mlxflow build profile"
    text = text_of(root)
    assert "profile is damaged" in text
    assert f"No memory profile to show: {line}" in text
    assert "Peak memory by phase" not in text
    assert "MLX's memory, at each step's end" in text, "the timeline stands"
    edit(root, "profile", lambda report: report["stage"].update(mlxflow="0.0.1"))
    other = f"mlxflow 0.0.1 wrote a report that this version cannot read: {line}"
    assert f"No memory profile to show: {other}" in text_of(root)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_every_field_stay_text(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, name=name)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_run(plain)
    seen, expected = Seen(render([read(tmp_path, name=name)])), Seen(render([read(plain)]))
    assert sorted(set(seen.tags)) == sorted(set(expected.tags))
    assert seen.tags.count("script") == expected.tags.count("script")
    assert not [key for key, _ in seen.attributes if key.startswith("on") or key in ("style", "src")]
    assert not re.search("[\x00-\x08\u202a-\u202e]", render([read(tmp_path, name=name)]).decode())


def test_the_same_reports_give_the_same_bytes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_run(other)
    assert render([read(root)]) == render([read(root)]) == render([read(other)])


def test_the_page_makes_no_requests_and_its_policy_forbids_them(root: Path) -> None:
    page = render([read(root)]).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    rules = dict(rule.split(" ", 1) for rule in policy[1].replace("&#39;", "'").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style", "script"):
        content = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert content
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    links = [value or "" for key, value in Seen(page.encode()).attributes if key in ("href", "src", "action", "data")]
    assert links
    assert all(link.startswith("#") for link in links)


def test_a_page_with_100_000_points_is_under_500_kb(long_page: Path) -> None:
    page = long_page.read_bytes()
    assert len(page) < 500_000
    assert "9000000" in page.decode()  # the peak, among 100,000 points


def test_every_plot_has_a_name_for_a_screen_reader_and_can_be_reached_by_key(root: Path) -> None:
    page = render([read(root)]).decode()
    for drawing in re.findall(r'<svg class="(?:area|graph|stacked)"[^>]*>', page):
        assert 'role="img"' in drawing
        assert re.search(r'aria-label="[^"]{20,}"', drawing)
    areas = re.findall(r'<svg class="area"[^>]*>', page)
    assert len(areas) > 8
    assert all('tabindex="0"' in area for area in areas)


def test_two_runs_stand_side_by_side_and_their_curves_in_one_plot(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_run(other)
    edit(other, "train", lambda report: report.update(last_validation_perplexity=21.5))
    (other / "artifacts/benchmark/report.toml").unlink()
    runs = [read(root, label="A: here"), read(other, label="B: there", name="other")]
    page = render(runs)
    text = Seen(page).text
    assert page == render(runs)
    assert len(page) < 500_000
    assert "by hand and other" in text
    assert "38.5 perplexity" in text
    assert "21.5 perplexity" in text
    assert "training, A: here" in text
    assert "training, B: there" in text
    assert 'class="line c0 b"' in page.decode()
    assert "No benchmark to show: artifacts/benchmark/report.toml is missing" in text


def test_two_runs_have_their_answers_timelines_and_bars_together(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_run(other)
    edit(other, "train", lambda report: report.update(last_validation_perplexity=21.5))

    def faster(report: dict[str, Any]) -> None:
        speed = {"tokens_per_second": 12000, "low_tokens_per_second": 11000, "high_tokens_per_second": 13000}
        report["training"][1].update(speed)
        report["training"].append(training_row("only here", 12000) | speed)

    edit(other, "benchmark", faster)
    page = render([read(root, label="A: here"), read(other, label="B: there")])
    text = Seen(page).text
    after = "perplexity on held-out text after 240 steps, from 2,079 before."
    assert f"Did it learn? A: here 38.5 {after} B: there 21.5 {after}" in text
    assert "workflow, 16 rows 8,000 12,000 1.50 times (1.34 to 1.67)" in text
    assert "baseline, 16 rows 4,000 4,000 1 times (0.905 to 1.11), inside the noise" in text
    assert "stage 410 410 1 times (0.952 to 1.05), inside the noise" in text
    both = page.decode().partition("MLX&#39;s memory of all runs, at each step&#39;s end")[2].partition("</figure>")[0]
    for name in ("active, A: here", "peak, A: here", "active, B: there", "peak, B: there"):
        assert f'"name":"{name}"' in both
    assert 'class="line c1 b"' in both  # a color for each run, a dash for what of it
    assert "The process&#39;s memory of all runs, sampled" in page.decode()


def _replaced(value: Any, number: Any) -> Any:
    """Return a part of a report with something else in the place of every number."""
    if isinstance(value, dict):
        return {key: _replaced(one, number) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, number) for one in value]
    return number if isinstance(value, int | float) else value


@pytest.mark.parametrize(
    "number",
    [
        '7" onload="alert(1)" x="',
        "' onload='alert(1)",
        [],
        [{}],
        {},
        True,
        -1,
        0,
        5e-324,
        1e150,
        1.7e308,
        -1.7e308,
        float("inf"),
        10**18,
    ],
)
def test_a_non_number_in_place_of_a_number_is_not_rendered_as_an_attribute(root: Path, number: Any) -> None:
    expected = {key for key, _ in Seen(render([read(root)])).attributes}
    for task in TASKS:
        edit(root, task, lambda report: report.update(_replaced(report, number)))
    assert {key for key, _ in Seen(render([read(root)])).attributes} <= expected


def test_missing_names_and_axis_ends_beyond_float_range_are_rendered(root: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        for row in report["training"]:
            row["name"] = [{}]

    edit(root, "benchmark", change)
    edit(root, "pretokenize", lambda report: report.update(_replaced(report, 5e-324)))
    assert b"Is it worth it?" in render([read(root)])
