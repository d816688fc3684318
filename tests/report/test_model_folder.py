"""What a model's folder says of itself and of its base."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxflow.report.model_folder import ModelFolderFacts, look_at


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"model": {"from": "base"}}, "base"),
        ({"model": "base"}, "base"),
        ({"model": {"from": "train:a"}}, ""),
        ({"model": "quantize:q4"}, ""),
        ({"model": {"hidden_size": 64}}, ""),
        ({"model": 3}, ""),
        ({}, ""),
    ],
)
def test_the_base_is_a_folder_and_not_another_stage(tmp_path: Path, config: dict[str, Any], base: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/LICENSE").write_text("MIT License")
    found = look_at(tmp_path, tmp_path / "model", config)
    assert found == ModelFolderFacts(False, False, base, "MIT License (LICENSE)" if base else "")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_and_code_are_seen(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "model.Model"}}))
    assert look_at(tmp_path, tmp_path, {}) == ModelFolderFacts(True, True, "", "")
    for damaged in ("tokenizer_config.json", "config.json"):
        (tmp_path / damaged).write_text("[" * 10_000)
    assert look_at(tmp_path, tmp_path, {}).has_code is False
