"""The facts at the top of the page."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

from mlxflow.report.facts import Fact, facts, settings_in_words
from mlxflow.training.settings import AdapterShape, Recomputation, TrainingSettings
from tests.report.runs import edit, read


def test_date_commit_size_and_settings_of_a_run(root: Path) -> None:
    edit(root, "train", lambda report: report["run"].update(ended="2026-01-02T03:04:05Z"))
    path = root / "mlxflow.lock"
    lock = tomllib.loads(path.read_text())
    for table in lock.values():
        table["commit"] = f"{'f' * 40}+changes"
    path.write_text(tomli_w.dumps(lock))
    assert facts(read(root)) == [
        Fact("Built", "2026-01-02 03:04:05 UTC"),
        Fact("Commit", "ffffffffff with changes"),
        Fact("Device", "stage"),
        Fact("Parameters", "68,672"),
        Fact("Trained on", "1 M tokens in 240 steps, 0.13 epochs"),
        Fact(
            "Settings",
            "learning rate 0.015 (cosine, 20 steps of warm-up); 32 rows of 64 tokens a step; adamw; weight decay 0.1; "
            "fp32; all weights; no layer is recomputed",
        ),
    ]


def test_artifacts_of_a_folder_without_git_have_no_commit(root: Path) -> None:
    path = root / "mlxflow.lock"
    path.write_text(path.read_text().replace('commit = "stage"', 'commit = "unknown"'))
    assert Fact("Commit", "none: the folder is in no git repository") in facts(read(root))


def test_adapters_are_named_by_method_and_rank() -> None:
    shape = AdapterShape("lora", 8, 20.0, 0.0, 0, ("*",))
    settings = TrainingSettings(adapters=shape, learning_rate=1e-4, grad_accum_steps=2, precision="bf16")
    assert settings_in_words(settings, None) == (
        "learning rate 0.0001 (cosine, 20 steps of warm-up); 64 rows a step; adamw; weight decay 0.1; bf16; "
        "LoRA of rank 8; no layer is recomputed"
    )


@pytest.mark.parametrize(
    ("checkpointing", "words"),
    [
        ("none", "no layer is recomputed"),
        ("layers", "every layer is recomputed"),
        ("pairs", "every layer is recomputed, in pairs"),
        (4, "one of 4 layers is recomputed"),
    ],
)
def test_what_is_recomputed_is_said_in_words(checkpointing: str | int, words: str) -> None:
    settings = Recomputation.of(checkpointing).applied_to(TrainingSettings())
    assert settings_in_words(settings, None).endswith(f"; all weights; {words}")
