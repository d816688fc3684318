"""The evaluation on the page: accuracies, differences with their intervals, and what was cut off."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.storage.run_context import Member
from tests.report.pages import Seen, text_of
from tests.report.runs import members


def _row(task: str, model: str, accuracy: float, **more: Any) -> dict[str, Any]:
    row = {"task": task, "model": model, "kind": "choice", "items": 400, "accuracy": accuracy, "standard_error": 0.02}
    return row | more


def _difference(task: str, model: str, difference: float, half: float) -> dict[str, Any]:
    ends = {"difference": difference, "low": difference - half, "high": difference + half, "better": 3, "worse": 11}
    return {"task": task, "model": model, "reference": "train"} | ends


def _page(root: Path, task: str = "evaluate", **changes: Any) -> Seen:
    folder = Path("artifacts", *task.split(":"))
    (root / folder).mkdir(parents=True)
    report: dict[str, Any] = {
        "confidence": 0.95,
        "accuracies": [
            _row("capitals", "train", 0.75, metrics={"accuracy_by_sum": 0.75}),
            _row("capitals", "quantize:q4", 0.7, truncated=2, uses_chat=True),
            _row("sums", "train", 1.0),
            _row("sums", "quantize:q4", 0.99),
        ],
        "differences": [
            _difference("capitals", "quantize:q4", -0.05, 0.02),
            _difference("sums", "quantize:q4", -0.01, 0.02),
        ],
        "stage": {"stage": task, "settings_digest": "5" * 32, "inputs_digest": "1" * 32, "seed": "0"},
        "run": {"seconds": 1.0, "device_name": "x", "system": "x", "python": "3.11", "peak_rss_bytes": 1},
    }
    report["stage"] |= {"mlxflow": version("mlxflow"), "mlx": "0.32"}
    report["run"] |= {"computed": 4, "known": 0}
    (root / folder / "report.toml").write_text(tomli_w.dumps(report | changes), encoding="utf-8")
    own = Member(task, folder, ("train", "quantize:q4"), (folder / "report.toml",))
    return Seen(render([read_run(root, [*members(), own], name="by hand")]))


def test_accuracies_and_differences_are_shown_with_their_errors(root: Path) -> None:
    text = _page(root).text
    assert "Accuracy; the whiskers are one standard error" in text
    assert "capitals train choice 400 75.0 \N{PLUS-MINUS SIGN} 2.0 0 accuracy_by_sum 0.75" in text
    assert "capitals quantize:q4 choice, chat 400 70.0 \N{PLUS-MINUS SIGN} 2.0 2" in text
    assert "Difference from train in percent points, with its 95% interval" in text
    assert "-5.0 (-7.0 to -3.0)" in text
    assert "capitals quantize:q4 train -5.0 -7.0 to -3.0 3 11 worse" in text
    assert "sums quantize:q4 train -1.0 -3.0 to +1.0 3 11 within the noise" in text
    assert "2 prompts did not fit into a model's context whole" in text


def test_the_summary_says_how_often_it_is_right_and_what_is_worse(root: Path) -> None:
    text = _page(root).text
    assert "How often is it right? 75.0 % of 400 items of capitals by train; 100.0 % on sums. " in text
    assert "quantize:q4 is -5.0 points from it on capitals." in text


def test_one_model_has_no_differences(root: Path) -> None:
    text = _page(root, accuracies=[_row("capitals", "train", 0.5)], differences=[]).text
    assert "50.0 % of 400 items of capitals by train." in text
    assert "Difference from" not in text


def test_a_run_without_an_evaluation_has_no_such_section(root: Path) -> None:
    assert "Evaluation" not in text_of(root)
    assert "How often is it right?" not in text_of(root)


def test_names_of_tasks_cannot_break_the_page(root: Path) -> None:
    seen = _page(root, accuracies=[_row("<script>x</script>\x00", "train", 0.5)], differences=[])
    assert "<script>x</script>\N{REPLACEMENT CHARACTER}, train" in seen.text  # as text
