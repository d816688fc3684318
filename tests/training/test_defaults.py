"""Defaults that follow from the method and the model's origin."""

from pathlib import Path

import pytest

from mlxflow.stages import train
from mlxflow.training.defaults import Defaults, defaults_of
from mlxflow.workflow.loader import load_workflow, resolved_toml


def _config(tmp_path: Path, text: str) -> train.Config:
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "workflow.toml").write_text(text)
    found = load_workflow(tmp_path / "workflow.toml").find("train").config
    assert isinstance(found, train.Config)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Defaults(1.5e-2, 32, 240, "auto")),
        ("num_epochs = 2", Defaults(1.5e-2, 32, "auto", 2.0)),
        ('model = { from = "org/model" }', Defaults(3e-5, 4, "auto", 3.0)),
        ('method = "lora"\nmodel = { from = "org/model" }', Defaults(1e-4, 4, "auto", 3.0)),
        ('method = "dora"\nmodel = { from = "org/model" }\nnum_steps = 7', Defaults(1e-4, 4, 7, "auto")),
        ('model = { from = "org/model" }\nlearning_rate = 0.5\nbatch_size = 9', Defaults(0.5, 9, "auto", 3.0)),
        ('model = { from = "org/model" }\nconstant_tokens_per_step = false', Defaults(3e-5, 4, 240, "auto")),
    ],
)
def test_defaults_fit_the_method_and_the_origin(text: str, expected: Defaults, tmp_path: Path) -> None:
    config = _config(tmp_path, f"[train]\n{text}\n")
    assert Defaults(*(getattr(config, name) for name in Defaults._fields)) == expected
    again = _config(tmp_path, resolved_toml(load_workflow(tmp_path / "workflow.toml")))
    assert again == config  # what `mlxflow check` prints means the same


def test_defaults_of_a_table_do_not_depend_on_its_own_values() -> None:
    assert defaults_of(train.Config(learning_rate=3.0, batch_size=2)) == defaults_of(train.Config())


def test_context_length_follows_the_model_that_training_continues(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("")
    found = []
    for positions in (96, 8192):
        (tmp_path / "base" / "config.json").write_text(f'{{"max_position_embeddings": {positions}, "model_type": "x"}}')
        (tmp_path / "workflow.toml").write_text('[train.model]\nfrom = "base"\n')
        found.append(load_workflow(tmp_path / "workflow.toml").find("pretokenize").config.context_length)  # type: ignore[attr-defined]
    (tmp_path / "workflow.toml").write_text("")
    found.append(load_workflow(tmp_path / "workflow.toml").find("pretokenize").config.context_length)  # type: ignore[attr-defined]
    assert found == [96, 1024, 64]
