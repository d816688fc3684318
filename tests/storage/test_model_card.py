"""The README.md of model folders, and the licences that are read from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxflow.storage import model_card
from mlxflow.storage.model_card import CardFacts, licence_of


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: 'a license'\n---\n"}, "other"),
        (
            {"README.md": "# A model\nlicense: it is free\n", "LICENSE": "\n  MIT License\n\nText"},
            "MIT License (LICENSE)",
        ),
        ({"README.md": "---\nlanguage: en\n---\nlicense: mit\n"}, ""),
        ({"COPYING": "x" * 200}, f"{'x' * 80} (COPYING)"),
        ({}, ""),
    ],
)
def test_a_licence_is_read_from_the_head_of_the_readme_or_a_licence_file(
    tmp_path: Path, files: dict[str, str], licence: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence


def _facts(**changed: Any) -> CardFacts:
    usual: dict[str, Any] = {
        "name": "notes",
        "stage": "train",
        "summary": "Train a model",
        "version": "9.9",
        "settings": {"num_steps": 20, "model": {"from": "base"}},
        "figures": {"steps": 1200, "loss": 1.23456789, "run": {"seconds": 3.0}, "quality": {"kl": 0.5}, "rows": [1]},
        "base": None,
        "base_name": "",
    }
    return CardFacts(**usual | changed)


def _card(folder: Path, **changed: Any) -> str:
    model_card.write(folder, _facts(**changed))
    return (folder / "README.md").read_text()


def test_a_card_has_settings_figures_and_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = _card(tmp_path)
    assert text.startswith("---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlxflow\n---\n\n# notes\n")
    assert "Train a model: made by the stage `train` of mlxflow 9.9." in text
    assert '    num_steps = 20\n    model.from = "base"\n' in text
    table = text.partition("|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert table == ["| steps | 1,200 |", "| loss | 1.23457 |", "| quality.kl | 0.5 |"]  # no times, no lists
    assert "mlx_lm.generate --prompt Once --model FOLDER" in text
    assert "AutoModelForCausalLM" in text
    assert text.endswith("Trained from scratch; choose one.\n")


@pytest.mark.parametrize(
    ("files", "line", "library"),
    [
        ({"config.json": "{}", "chat_template.jinja": "x"}, "mlx_lm.chat --model FOLDER", "mlx"),
        ({"config.json": "{}", "adapters.safetensors": ""}, "Once --model FOLDER --adapter-path FOLDER", "mlx"),
        ({"model.gguf": ""}, "llama-cli -m model.gguf", "gguf"),
        ({"adapter.gguf": ""}, "llama-cli -m base.gguf --lora adapter.gguf", "gguf"),
        ({"adapter_model.safetensors": ""}, 'PeftModel.from_pretrained(model, "FOLDER")', "peft"),
    ],
)
def test_the_commands_fit_the_files(tmp_path: Path, files: dict[str, str], line: str, library: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    text = _card(tmp_path, base_name="base")
    assert line in text
    assert f"library_name: {library}\n" in text
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {}}))
    assert "AutoTokenizer" not in _card(tmp_path)


def test_base_and_licence_are_those_of_the_models_before(tmp_path: Path) -> None:
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    for folder in (base, first, second):
        folder.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/name\n---\n")
    assert "license: apache-2.0\nbase_model: owner/name\n" in _card(first, base=base, base_name="base")
    text = _card(second, base=first, base_name="train")
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: owner/name\n")
    assert "mlxflow 9.9 from train." in text
    assert text.endswith("\napache-2.0\n")
    assert "base_model: some/model\n" in _card(first, base_name="some/model@main")
    assert "base_model" not in _card(first, base=base.parent, base_name="some/folder").partition("# notes")[0]
    (base / "README.md").unlink()
    (base / "LICENSE").write_text("A Licence With Spaces")
    assert "license: other\n" in _card(first, base=base, base_name="base")


def test_changed_settings_are_those_that_differ_from_the_default() -> None:
    defaults = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    assert model_card.changed_settings({"a": 1, "b": {"c": 2, "d": 9}, "e": {"f": 4}, "g": 5}, defaults) == {
        "b": {"d": 9},
        "g": 5,
    }
