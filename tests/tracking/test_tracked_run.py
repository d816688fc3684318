"""What trackers are told: points of a line, settings and figures by dotted key."""

import json
import tomllib
from pathlib import Path

import pytest

from mlxflow.tracking.tracked_run import CurvePoint, final_figures, numbers_of, points_of, settings_of
from tests.tracking.runs import REPORT, run_in


def test_the_numbers_of_a_record_are_points_of_its_step() -> None:
    record = {
        "kind": "train",
        "step": 3,
        "loss": 2.5,
        "skipped": None,
        "seconds": 1.5,
        "waited": [0.25, 0.5],
        "is": True,
    }
    assert list(points_of(json.dumps(record).encode())) == [
        CurvePoint("train/loss", 3, 2.5, 1.5),
        CurvePoint("train/seconds", 3, 1.5, 1.5),
        CurvePoint("train/waited.0", 3, 0.25, 1.5),
        CurvePoint("train/waited.1", 3, 0.5, 1.5),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"3",
        b'{"kind": "train"}',
        b'{"kind": "train", "step": -1, "loss": 1}',
        b'{"kind": "train", "step": true, "loss": 1}',
        b'{"kind": 3, "step": 1, "loss": 1}',
        b'{"kind": "train", "step": 1, "loss": NaN}',
        b'{"kind": "train", "step": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"kind": "train", "step": 1, "loss": "\xff"}',
    ],
)
def test_a_line_that_is_no_record_has_no_points(line: bytes) -> None:
    assert list(points_of(line)) == []


def test_settings_are_scalars_by_dotted_key() -> None:
    config = {"model": {"hidden_size": 64}, "betas": [0.9, 0.95], "fuse": "auto", "none": None}
    assert settings_of(config, seed="0") == {
        "model.hidden_size": 64,
        "betas": "[0.9, 0.95]",
        "fuse": "auto",
        "seed": "0",
    }


def test_final_figures_leave_out_origin_settings_and_files_and_name_rows_by_their_model() -> None:
    figures = final_figures(tomllib.loads(REPORT))
    assert figures == {
        "warnings.0": "a warning",
        "last_validation_perplexity": 4.5,
        "models.quantize:q4.model": "quantize:q4",
        "models.quantize:q4.perplexity": 5.5,
        "run.seconds": 2.5,
        "run.device_name": "a processor",
    }
    assert numbers_of(figures) == {
        "last_validation_perplexity": 4.5,
        "models.quantize:q4.perplexity": 5.5,
        "run.seconds": 2.5,
    }


def test_a_run_has_an_id_and_a_project_that_every_tracker_takes(tmp_path: Path) -> None:
    run = run_in(tmp_path, [], task="quantize:q4", project="a/b c?d")
    assert (run.run_id, run.project_id, run.kind) == ("quantize-q4-0123456789ab", "a-b-c-d", "quantize")
