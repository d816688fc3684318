import base64
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.stage_reports.report import SampleText
from mlxflow.workflow.stage import Member
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


class Seen(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page.decode())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path)
    return tmp_path


def _text(root: Path) -> str:
    return Seen(render([read(root)])).text


def test_the_answers_stand_first_in_a_line_each(root: Path) -> None:
    text = _text(root)
    answers = text[: text.index("What reads from what")]
    for line in (
        "6 of 6 stages built; together they took 75 s.",
        "7.90 M tokens of 713 documents to learn from, 236,147 held out. 1 record could not be read.",
        "38.5 perplexity on held-out text after 240 steps, from 2,079 before",
        "6,757 tokens learned from a second while training; 0.2 % of the time it waited for data.",
        "7.10 times smaller than in fp32: 49.1 KB, 4.50 bits a weight; perplexity 39.11 ± 0.50, dense 38.5.",
        "9 MB in MLX's arrays at the peak of a training step, the largest part of it weights (4 MB, 44%); no leak.",
        "2 times the speed of the plain baseline (1.86 to 2.16).",
    ):
        assert line in answers


def test_the_largest_part_of_the_peak_is_called_most_of_it_from_a_half_on(root: Path) -> None:
    edit(root, "profile", lambda report: report["composition"].update(weights_bytes=0, update_bytes=6 * 10**6))
    assert "at the peak of a training step, most of it update (6 MB, 55%); no leak." in _text(root)


def test_a_model_that_was_trained_meanwhile_is_called_another_one(root: Path) -> None:
    quality = {"perplexity": 16.6, "dense_perplexity": 17.9, "kl": 0.42, "top1_agreement": 0.71}
    edit(root, "quantize:q4", lambda report: report["quality"].update(quality))
    said = (
        "dense 17.9; but its predictions diverge from the dense model's by 0.420 nats a token and share 71.0 % of "
        "first choices: not the dense model made smaller, another one that fits this text."
    )
    text = _text(root)
    assert said in text
    assert text.count("not the dense model made smaller") == 1, "rounding alone is not"
    quality = {"perplexity": 17.9 * 1.4, "dense_perplexity": 17.9, "kl": 0.42}
    edit(root, "quantize:q4", lambda report: report["quality"].update(quality))
    assert "not the dense model made smaller" not in _text(root), "the perplexity shows as much"


def test_sizes_are_held_against_the_dense_model_too(root: Path) -> None:
    edit(root, "quantize:q4", lambda report: report.update(dense_bits_per_weight=16.0))
    text = _text(root)
    assert (
        "7.10 times smaller than in fp32, 3.56 times smaller than the dense model of 16 bits a weight: 49.1 KB" in text
    )
    assert "Times smaller than fp32 Than the dense model" in text
    assert "Times smaller than fp32 Than the trained model" in text


def test_each_variant_of_train_has_its_answers(root: Path) -> None:
    for name, perplexity in (("full", 12.5), ("lora", 14.5)):
        shutil.copytree(root / "artifacts/train", root / "artifacts" / f"train-{name}")
        path = root / "artifacts" / f"train-{name}/report.toml"
        report = tomllib.loads(path.read_text())
        path.write_text(tomli_w.dumps(report | {"last_validation_perplexity": perplexity}))
    found = [
        Member(
            f"train:{name}", Path("artifacts", f"train-{name}"), (), (Path("artifacts", f"train-{name}/report.toml"),)
        )
        for name in ("full", "lora")
    ]
    text = Seen(render([read_run(root, found, name="two")])).text
    assert "Did full learn? 12.5 perplexity on held-out text after 240 steps" in text
    assert "Did lora learn? 14.5 perplexity on held-out text after 240 steps" in text
    assert "How fast was full? 6,757" in text
    assert "How fast was lora? 6,757" in text


@pytest.mark.parametrize(
    ("task", "key", "question"),
    [
        ("pretokenize", "train", "What is {} made of? {}"),
        ("profile", "peak_memory_bytes", "Where does memory go in {}? {}"),
        ("benchmark", "promises", "Is it worth it in {}? {}"),
    ],
)
def test_each_variant_of_a_stage_has_its_answer(root: Path, task: str, key: str, question: str) -> None:
    speed = {"promise": "fast", "holds": True}
    values: dict[str, list[tuple[Any, str]]] = {
        "train": [({"tokens": 1234}, "1,234"), ({"tokens": 5678}, "5,678")],
        "peak_memory_bytes": [(2_340_000, "2.34 MB"), (3_450_000, "3.45 MB")],
        "promises": [
            ({"training_speed": speed | {"measured": ratio, "low": ratio - 0.1, "high": ratio + 0.1}}, shown)
            for ratio, shown in ((1.5, "1.50"), (2.5, "2.50"))
        ],
    }
    members = []
    for name, (value, _) in zip(("one", "two"), values[key], strict=True):
        folder = Path("artifacts", f"{task}-{name}")
        shutil.copytree(root / "artifacts" / task, root / folder)
        path = root / folder / "report.toml"
        table = tomllib.loads(path.read_text())
        path.write_text(tomli_w.dumps(table | {key: table[key] | value if isinstance(value, dict) else value}))
        members.append(Member(f"{task}:{name}", folder, (), (folder / "report.toml",)))
    text = Seen(render([read_run(root, members, name="two")])).text
    for name, (_, shown) in zip(("one", "two"), values[key], strict=True):
        assert question.format(name, shown) in text


def test_a_gain_inside_the_noise_is_called_that(root: Path) -> None:
    edit(
        root,
        "benchmark",
        lambda report: report["training"][1].update(tokens_per_second=4100, low_tokens_per_second=3900),
    )
    assert "That is inside the noise." in _text(root)


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
        "Arithmetic: 10 of 40 GFLOP/s, 25.0 %",
        "stage and on",
        "Machine and versions",
        "mlxflow.lock: what each stage was made of",
    ):
        assert words in text
    assert "9 MB in stage, step 66" in text  # the peak that is pointed out
    assert 'class="note"' not in page.decode()


def test_a_row_that_did_not_fit_says_so_and_the_others_stand(root: Path) -> None:
    failed = [{"model": "quantize:q2", "model_bytes": 10, "error": "does not fit: 5 bytes more may not be had"}]
    edit(root, "benchmark", lambda report: report["models"].extend(failed))
    big = {"name": "workflow", "batch_size": 64, "error": "does not fit"}
    edit(root, "benchmark", lambda report: report["training"].append(big))
    text = _text(root)
    assert "quantize:q2: does not fit: 5 bytes more may not be had" in text
    assert "workflow, 64 rows: does not fit" in text
    assert "stage 49.1 KB 7.10 5.60" in text


def test_a_device_that_slowed_down_is_told(root: Path) -> None:
    edit(root, "benchmark", lambda report: report["drift"].update(ratio=1.21, is_noticed=True))
    assert "took 1.21 times as long a step. The device slowed down meanwhile." in _text(root)


def test_the_speed_of_rounds_taken_together_is_the_one_that_answers(root: Path) -> None:
    told = {"promise": "fast", "measured": 1.9, "low": 1.8, "high": 2.0, "holds": True, "figure": "1.90 times"}
    edit(root, "benchmark", lambda report: report["promises"].update(training_speed=told))
    assert "1.90 times the speed of the plain baseline (1.80 to 2)." in _text(root)
    assert "fast 1.90 times yes" in _text(root)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_missing_is_said_and_the_rest_is_shown(root: Path, task: str) -> None:
    (root / "artifacts" / Path(*task.split(":")) / "report.toml").unlink()
    text = _text(root)
    assert f"{task} is not built" in text
    assert f"artifacts/{task.replace(':', '/')}/report.toml is missing. Run: doit {task}" in text
    assert "5 of 6 stages built" in text


def test_a_stage_that_failed_tells_its_last_words(root: Path) -> None:
    (root / "artifacts/quantize/q4/report.toml").unlink()
    (root / "artifacts/logs").mkdir()
    (root / "artifacts/logs/quantize-q4.log").write_text("begun\nquantize:q4: perplexity is 12 % above the limit\n\n")
    assert "Its last run ended with: quantize:q4: perplexity is 12 % above the limit" in _text(root)


def test_an_empty_run_is_a_page_that_says_so(tmp_path: Path) -> None:
    text = _text(tmp_path)
    assert "0 of 6 stages built" in text
    for words in ("No corpus to show", "No learning curve to show", "No memory profile", "No benchmark to show"):
        assert words in text
    assert "mlxflow.lock is missing" in text
    assert Seen(render([read_run(tmp_path, [], name="nothing")])).text.startswith("nothing")


def test_a_damaged_report_is_told_and_the_others_stand(root: Path) -> None:
    (root / "artifacts/train/report.toml").write_text("steps = ")
    text = _text(root)
    assert "artifacts/train/report.toml is damaged" in text
    assert "train is damaged" in text
    assert "Peak memory by phase" in text


def test_a_report_of_another_version_is_shown_and_called_out_of_date(root: Path) -> None:
    edit(root, "profile", lambda report: report["stage"].update(mlxflow="0.0.1"))
    text = _text(root)
    assert "profile is out of date" in text
    assert "artifacts/profile/report.toml was written by mlxflow 0.0.1." in text
    assert "Peak memory by phase" in text


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
def test_a_report_that_is_not_of_its_form_is_as_if_it_were_not_there_and_said(
    root: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(root, "profile", change)
    line = f"artifacts/profile/report.toml: {said}. Run: doit profile"
    text = _text(root)
    assert "profile is damaged" in text
    assert f"No memory profile to show: {line}" in text
    assert "Peak memory by phase" not in text
    assert "MLX's memory, at each step's end" in text, "the timeline stands"
    edit(root, "profile", lambda report: report["stage"].update(mlxflow="0.0.1"))
    other = f"mlxflow 0.0.1 wrote a report that this version cannot read: {line}"
    assert f"No memory profile to show: {other}" in _text(root)


def test_a_timeline_cut_off_by_a_crash_is_shown_until_there(root: Path) -> None:
    path = root / "artifacts/profile/timeline.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    page = render([read(root)]).decode()
    assert "profile/timeline.safetensors is damaged or was cut off in" in page
    assert "MLX&#39;s memory, at each step&#39;s end" in page
    path.write_bytes(b"\xff" * 40)
    page = render([read(root)]).decode()
    assert "profile/timeline.safetensors is damaged: its header cannot be read. Run: doit profile" in page


def _leave_a_journal(root: Path, *, end: bool = False) -> Path:
    left = root / "artifacts/.mlxflow/unfinished/profile/0123456789ab/timeline.jsonl"
    left.parent.mkdir(parents=True)
    told: list[list[object]] = [["columns", "seconds", "active_memory_bytes"], ["enter", "load_model", 0.0]]
    told += [["phase", "load_model", 0.0, 0.5, 5e8], ["sample", 0.6, 1e8], ["step", 1, 0.7, 3e8], ["step", 2, 0.9, 2e8]]
    told += [["enter", "training_step", 0.9], ["enter", "training_step/update", 1.0]]
    told += [["end"]] if end else []
    left.write_text("".join(f"{json.dumps(line)}\n" for line in told) + '["sample", 1.1, 2')
    return left


def test_what_a_killed_profile_saw_is_shown_beside_the_artifact(root: Path) -> None:
    _leave_a_journal(root)
    page = Seen(render([read(root)]))
    said = "The last run of profile was cut off in training_step/update after step 2; all that it measured until then"
    assert said in page.text
    labels = " ".join(value or "" for key, value in page.attributes if key == "aria-label")
    assert "MLX's memory, at each step's end until then. active: 300 MB at most." in labels
    assert "active: 100 MB at most. Phases: load_model, training_step, training_step/update." in labels
    assert "9 MB in MLX's arrays at the peak of a training step" in page.text  # the artifact is as it was
    assert page.text.count("MLX's memory, sampled until then") == 1


def test_a_profile_that_failed_is_not_called_cut_off_and_a_newer_artifact_ends_it(root: Path) -> None:
    left = _leave_a_journal(root, end=True)
    assert "The last run of profile failed or was stopped in training_step/update after step 2" in _text(root)
    report = root / "artifacts/profile/report.toml"
    os.utime(report, ns=(0, left.stat().st_mtime_ns + 1))
    assert "The last run of profile" not in _text(root)
    report.unlink()
    assert "500 MB at most until the profile ended: it failed" in _text(root)


def test_a_journal_of_nonsense_is_shown_as_far_as_it_can_be_read(root: Path) -> None:
    left = _leave_a_journal(root)
    left.write_bytes(
        b'\xff\n[]\n3\n["step"]\n["phase",1]\n["enter"]\n["columns"]\n{"a":1}\n["step",null]\n["enter",2,"x"]'
    )
    text = _text(root)
    assert "The last run of profile was cut off before the first step's end" in text
    assert "profile left a timeline that holds no readings." in text


def test_what_was_kept_out_of_training_is_said(root: Path) -> None:
    edit(root, "pretokenize", lambda report: report.update(warnings=["kept out of training: d/test.jsonl"]))
    text = _text(root)
    assert "kept out of training: d/test.jsonl" in text
    assert "rows without a token to learn 4" in text


def test_a_torn_line_of_the_learning_curve_is_told(root: Path) -> None:
    with (root / "artifacts/train/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert "train/metrics.jsonl: 1 of its lines cannot be read and are left out." in _text(root)


def test_a_model_that_could_not_be_asked_is_told(root: Path) -> None:
    run = read(root, samples=[SampleText(model="train", model_key="", error="no room")])
    assert "train could not be asked: no room" in Seen(render([run])).text


def test_samples_of_an_earlier_model_are_left_out(root: Path) -> None:
    edit(root, "train", lambda report: report["stage"].update(inputs_digest="another"))
    text = _text(root)
    assert "stage and on" not in text
    assert "1 samples of earlier models are left out. Run: doit report" in text


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


def test_nothing_on_the_page_asks_for_anything_and_the_policy_says_so(root: Path) -> None:
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


def test_100_000_points_stay_under_500_kb(long_page: Path) -> None:
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


def test_the_answer_says_what_the_files_lost_of_the_gain(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lossy")
    write_run(folder)
    edit(folder, "train", lambda report: report.update(trained_validation_perplexity=30.0, gain_kept=0.293))
    edit(folder, "train", lambda report: report.update(fuse="never"))
    text = Seen(render([read(folder)])).text
    assert "beside the base model: a tool that does not apply them opens the base model." in text
    assert "from 2,079 before. The trained model had 30: its files keep 29.3 % of the gain." in text


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
    both = page.decode().partition("MLX&#39;s memory of both runs, at each step&#39;s end")[2].partition("</figure>")[0]
    for name in ("active, A: here", "peak, A: here", "active, B: there", "peak, B: there"):
        assert f'"name":"{name}"' in both
    assert 'class="line c1 b"' in both
    assert "The process&#39;s memory of both runs, sampled" in page.decode()


def test_phases_lie_over_the_timeline_with_their_peaks(root: Path) -> None:
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


def test_very_many_phases_are_drawn_together(long_page: Path) -> None:
    page = long_page.read_text()
    sampled = page.partition("<figcaption>MLX&#39;s memory, sampled")[2].partition("</figure>")[0]
    told = json.loads(re.search(r"<script[^>]*>(.*?)</script>", sampled)[1])["bands"]  # type: ignore[index]
    assert len(told) < 500
    counts = [
        int(name.removeprefix("step, ").removesuffix(" times").replace(",", "")) for name, *_ in told if "times" in name
    ]
    assert sum(counts) == 100_000
    assert max(value for *_, value in told) == 9_000_000


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
def test_whatever_stands_for_a_number_is_no_attribute_and_stops_no_page(root: Path, number: Any) -> None:
    expected = {key for key, _ in Seen(render([read(root)])).attributes}
    for task in TASKS:
        edit(root, task, lambda report: report.update(_replaced(report, number)))
    assert {key for key, _ in Seen(render([read(root)])).attributes} <= expected


def test_names_that_are_none_and_ends_of_axes_beyond_what_is_computed(root: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        for row in report["training"]:
            row["name"] = [{}]

    edit(root, "benchmark", change)
    edit(root, "pretokenize", lambda report: report.update(_replaced(report, 5e-324)))
    assert b"Is it worth it?" in render([read(root)])
