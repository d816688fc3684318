"""The commands that load a model, and the table of models."""

import tomllib
from pathlib import Path

import tomli_w

from mlxflow.report.elements import Code, Note, Table
from mlxflow.report.model_folder import ModelFolderFacts
from mlxflow.report.sections.models import commands, section
from tests.report.runs import edit, read


def test_each_model_has_its_folder_size_base_and_licence(root: Path) -> None:
    path = root / "mlxflow.lock"
    lock = tomllib.loads(path.read_text())
    lock["train"]["config"] = {"model": {"from": "base"}}
    path.write_text(tomli_w.dumps(lock))
    (root / "base").mkdir()
    (root / "base/LICENSE").write_text("MIT License")
    table, *loads = section([read(root)]).blocks
    assert isinstance(table, Table)
    assert [row[:2] + row[5:] for row in table.rows] == [
        ("train", "artifacts/train", "base", "MIT License (LICENSE)"),
        ("quantize:q4", "artifacts/quantize/q4", "train, from base", "MIT License (LICENSE)"),
        ("quantize:q8", "artifacts/quantize/q8", "train, from base", "MIT License (LICENSE)"),
    ]
    assert [(one.caption, one.folded) for one in loads if isinstance(one, Code)] == [
        ("Load and use train", False),
        ("Load and use quantize:q4", True),
        ("Load and use quantize:q8", True),
    ]


def test_without_a_built_model_there_is_a_note(root: Path) -> None:
    for config in root.glob("artifacts/**/config.json"):
        config.unlink()
    (note,) = section([read(root)]).blocks
    assert note == Note("There is no model to load: no stage that makes one is built.")


def test_the_commands_fit_the_model(root: Path) -> None:
    run = read(root)
    train, quantized = run.of_kind("train")[0], run.of_kind("quantize")[0]
    text, chat = ModelFolderFacts(False, False, "", ""), ModelFolderFacts(True, True, "", "")
    assert commands(quantized, text).splitlines() == [
        "# with mlxflow",
        'mlxflow generate artifacts/quantize/q4 --prompt "Once"',
        "",
        "# with mlx-lm",
        'mlx_lm.generate --model artifacts/quantize/q4 --prompt "Once"',
    ]
    assert "mlxflow chat artifacts/train --trust-remote-code" in commands(train, chat)
    assert 'AutoModelForCausalLM.from_pretrained("artifacts/train", trust_remote_code=True)' in commands(train, chat)
    edit(root, "train", lambda report: report.update(fuse="never"))
    beside = commands(read(root).of_kind("train")[0], chat)
    assert "mlx_lm.chat --model artifacts/train --adapter-path artifacts/train --trust-remote-code" in beside
    assert "transformers" not in beside
