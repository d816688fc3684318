"""Every stage's report through its struct: equal bytes when written again, and a line for each key that is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.report.stage_reports.report import PageReport
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report
from mlxflow.storage.report_structs import StageReport

FORMS: dict[str, type[StageReport]] = {
    "pretokenize": PretokenizeReport,
    "train": TrainReport,
    "quantize/q4": QuantizeReport,
    "profile": ProfileReport,
    "benchmark": BenchmarkReport,
    "report": PageReport,
}


@pytest.mark.parametrize("stage", FORMS)
def test_a_report_is_equal_bytes_when_it_is_written_again(built: Path, tmp_path: Path, stage: str) -> None:
    path = built / "artifacts" / stage / "report.toml"
    report = report_structs.read(path, FORMS[stage], advice="Run: doit")
    report_structs.write(tmp_path / "report.toml", report)
    assert (tmp_path / "report.toml").read_bytes() == path.read_bytes()


def _lines(table: dict[str, Any], form: type[StageReport]) -> list[str]:
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(table, form, shown="report.toml", advice="Run: mlxflow build train")
    return [
        line.removeprefix("report.toml: ").removesuffix(". Run: mlxflow build train")
        for line in str(caught.value).split("\n")
    ]


@pytest.mark.parametrize("stage", FORMS)
def test_every_missing_and_unknown_key_has_a_line(built: Path, stage: str) -> None:
    table = read_report(built / "artifacts" / stage / "report.toml")
    optional = {field.name for field in msgspec.structs.fields(FORMS[stage]) if not field.required}
    for key in table.keys() - optional:
        without = {name: value for name, value in table.items() if name != key}
        assert _lines(without, FORMS[stage]) == [f"{key}: missing"]
    assert _lines(table | {"surplus": 1}, FORMS[stage]) == ["surplus: unknown key"]
    assert _lines(table | {"run": table["run"] | {"surplus": 1}}, FORMS[stage]) == ["run.surplus: unknown key"]
    assert _lines(table | {"stage": 3}, FORMS[stage]) == ["stage: expected a table"]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.update(steps="many"), "steps: expected `int`, got `str`"),
        (lambda table: table.update(steps=-1), "steps: expected `int` >= 0"),
        (lambda table: table.update(kernels=[1]), "kernels[0]: expected `str`, got `int`"),
        (lambda table: table["settings"].pop("schedule"), "settings.schedule: missing"),
        (lambda table: table["settings"].update(lr=1), "settings.lr: unknown key"),
        (lambda table: table["run"].pop("compile_seconds"), "run.compile_seconds: missing"),
        (lambda table: table["run"].pop("python"), "run.python: missing"),
        (lambda table: table["run"].update(seconds="long"), "run.seconds: expected `float`, got `str`"),
        (lambda table: table["stage"].pop("mlx"), "stage.mlx: missing"),
        (lambda table: table.update(gain_kept=float("nan")), "gain_kept = nan: expected a finite number"),
        (
            lambda table: table["settings"].update(optimizer_options={"betas": [0.9, float("inf")]}),
            "settings.optimizer_options.betas[1] = inf: expected a finite number",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_key(built: Path, change: Change, said: str) -> None:
    table = read_report(built / "artifacts/train/report.toml")
    change(table)
    assert _lines(table, TrainReport) == [said]


def test_a_report_of_nothing_but_unknown_keys_has_a_few_lines() -> None:
    assert len(_lines({f"key{number}": number for number in range(1000)}, PageReport)) == 10


def test_an_optional_key_that_is_missing_is_none_and_is_not_written(built: Path) -> None:
    table = read_report(built / "artifacts/train/report.toml")
    del table["gain_kept"]
    report = report_structs.parse(table, TrainReport, shown="report.toml", advice="")
    assert report.figures.gain_kept is None
    assert tomli_w.dumps(report_structs.as_table(report)) == tomli_w.dumps(table)


def test_the_table_of_provenance_can_be_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.toml"
    about = dict.fromkeys(("stage", "settings_digest", "inputs_digest", "seed", "mlxflow", "mlx"), "x")
    path.write_text(tomli_w.dumps({"stage": about, "steps": "many"}))
    assert report_structs.read_provenance(path, advice="Run: mlxflow build train").stage == "x"
    path.write_text(tomli_w.dumps({"steps": 3}))
    with pytest.raises(ArtifactError) as caught:
        report_structs.read_provenance(path, advice="Run: mlxflow build train")
    assert str(caught.value) == f"{path}: stage: expected a table. Run: mlxflow build train"


class _Run(msgspec.Struct, frozen=True):
    seconds: float


class _Part(msgspec.Struct, frozen=True):
    run: _Run
    steps: int | None = None


def test_part_of_a_report_ignores_the_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "report.toml"
    path.write_text("loss = nan\n[run]\nseconds = 2.0\nlater = true\n")
    assert report_structs.read_part(path, _Part, advice="") == _Part(_Run(2.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 3\n", "run: missing"),
        ("run = 3\n", "run: expected `object`, got `int`"),
        ("[run]\nseconds = 'two'\n", "run.seconds: expected `float`, got `str`"),
    ],
)
def test_part_of_a_report_with_a_wrong_key_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "report.toml"
    path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        report_structs.read_part(path, _Part, advice="Run: mlxflow build train")
    assert str(caught.value) == f"{path}: {said}. Run: mlxflow build train"
