"""Reports that others wrote: whoever prints or compares them says in one line what is not of the form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxflow.__main__ import main
from mlxflow.stages import benchmark

LAYER = {
    "path": "model.layers.0.mlp.up_proj",
    "shape": [64, 32],
    "mode": "affine",
    "bits": 4,
    "group_size": 32,
    "bytes": 1280,
    "bits_per_weight": 5.0,
    "relative_error": 0.05,
}
QUALITY = {
    "dense_perplexity": 20.0,
    "perplexity": 21.0,
    "perplexity_standard_error": 0.5,
    "kl": 0.01,
    "top1_agreement": 0.95,
}
SIZES = {"parameters": 2048, "model_bytes": 1400, "bits_per_weight": 5.0, "compression_ratio_fp32": 6.0}


def _quantized() -> dict[str, Any]:
    return {**SIZES, "compression_ratio_bf16": 3.0, "layers": [LAYER.copy()], "quality": QUALITY.copy()}


def _benchmarked() -> dict[str, Any]:
    speed = {"tokens_per_second": 100.0, "low_tokens_per_second": 99.0, "high_tokens_per_second": 101.0}
    training = {"name": "workflow", "batch_size": 2, "peak_memory_bytes": 1000, **speed}
    model = {"model": "train", "model_bytes": 1000, "prefill": [{"prompt_tokens": 8, **speed}]}
    return {
        "version": benchmark.VERSION,
        "device": {"name": "one", "kind": "cpu"},
        "training": [training],
        "models": [model],
    }


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.pop("layers"), "Object missing required field `layers`"),
        (lambda report: report.update(layers=3), "Expected `array`, got `int` - at `layers`"),
        (lambda report: report.update(layers=[3]), "Expected `object`, got `int` - at `layers[0]`"),
        (lambda report: report["layers"][0].pop("bits"), "Object missing required field `bits` - at `layers[0]`"),
        (lambda report: report["layers"][0].update(bits="4"), "Expected `int`, got `str` - at `layers[0].bits`"),
        (lambda report: report["layers"][0].update(path=["x"]), "Expected `str`, got `array` - at `layers[0].path`"),
        (lambda report: report.update(parameters="many"), "Expected `int`, got `str` - at `parameters`"),
        (lambda report: report.update(parameters=-1), "Expected `int` >= 0 - at `parameters`"),
        (lambda report: report.update(quality=[]), "Expected `object | null`, got `array` - at `quality`"),
        (lambda report: report["quality"].pop("kl"), "Object missing required field `kl` - at `quality`"),
    ],
)
def test_a_report_of_another_form_is_not_printed(
    job: Path, change: Change, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (job / "artifacts/quantize/q4").mkdir(parents=True)
    path, report = job / "artifacts/quantize/q4/report.toml", _quantized()
    path.write_text(tomli_w.dumps(report))
    workflow = ["--workflow", str(job / "workflow.toml")]
    assert main(["show", "quantize:q4", *workflow]) == 0
    assert "perplexity 20 -> 21" in capsys.readouterr().out
    change(report)
    path.write_text(tomli_w.dumps(report))
    assert main(["show", "quantize:q4", *workflow]) == 2
    expected = f"{path}: not a report as this version of mlxflow writes it ({said}). Run: doit quantize:q4\n"
    assert tuple(capsys.readouterr()) == ("", expected)


def test_odd_but_valid_numbers_and_names_are_printed(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "artifacts/quantize/q4").mkdir(parents=True)
    report = _quantized() | {"bits_per_weight": float("inf"), "compression_ratio_fp32": float("nan")}
    report["layers"][0] |= {"path": "[red]\x1b]0;t\x07\nx", "relative_error": 7, "bytes": 0}
    (job / "artifacts/quantize/q4/report.toml").write_text(tomli_w.dumps(report))
    assert main(["show", "quantize:q4", "--workflow", str(job / "workflow.toml")]) == 0
    shown = capsys.readouterr().out
    assert "[red]\\x1b]0;t\\x07" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.pop("device"), "Object missing required field `device`"),
        (lambda report: report.update(device=[]), "Expected `object`, got `array` - at `device`"),
        (lambda report: report["training"][0].pop("name"), "Object missing required field `name` - at `training[0]`"),
        (
            lambda report: report["training"][0].pop("low_tokens_per_second"),
            "`tokens_per_second` without `low_tokens_per_second` - at `training[0]`",
        ),
        (
            lambda report: report["training"][0].update(tokens_per_second=0.0),
            "Expected `float` > 0.0 - at `training[0].tokens_per_second`",
        ),
        (
            lambda report: report["models"][0]["prefill"][0].update(tokens_per_second="fast"),
            "Expected `float`, got `str` - at `models[0].prefill[0].tokens_per_second`",
        ),
        (
            lambda report: report["models"][0].update(perplexity=3.0),
            "`perplexity` without `perplexity_standard_error` - at `models[0]`",
        ),
        (
            lambda report: report["models"][0].update(machine_seconds=-1.0),
            "Expected `float` >= 0.0 - at `models[0].machine_seconds`",
        ),
    ],
)
def test_a_benchmark_of_another_form_is_not_compared(
    tmp_path: Path, change: Change, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, report = tmp_path / "good.toml", tmp_path / "bad.toml", _benchmarked()
    good.write_text(tomli_w.dumps(report))
    assert main(["compare", str(good), str(good)]) == 0
    assert "noise" in capsys.readouterr().out
    change(report)
    bad.write_text(tomli_w.dumps(report))
    for order in ((good, bad), (bad, good)):
        assert main(["compare", *map(str, order)]) == 2
        expected = f"{bad}: not a report as this version of mlxflow writes it ({said}). Run: doit benchmark\n"
        assert tuple(capsys.readouterr()) == ("", expected)
