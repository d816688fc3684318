"""The export stage in a workflow: what it writes, when it is stale, and what is refused before anything is trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from mlxflow.messages.errors import WorkflowError
from mlxflow.models import model_folder
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import TINY, doit, mlxflow

HEAD = TINY.read_text().replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]', 1).partition("[profile]")[0]
EXPORTS = """
[[export]]
name = "dense"
[[export]]
name = "q4"
model = "quantize:q4"
"""


def _exported(project: Path, variant: str) -> Path:
    (project / "export.toml").write_text(HEAD + EXPORTS)
    workflow = load_workflow(project / "export.toml")
    return execute_stage(workflow, workflow.find(f"export:{variant}"))


def test_a_trained_model_is_written_in_16_bits(project: Path) -> None:
    folder = _exported(project, "dense")
    report = read_report(folder / "report.toml")
    assert (report["format"], report["architecture"], report["type"]) == ("gguf", "llama", "f16")
    assert 0 < report["largest_relative_error"] < 2**-11
    assert "requantized" not in report
    found = {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(folder / "model.gguf").tensors}
    model, _ = model_folder.load(project / "artifacts/train")
    expected = np.array(model.layers[0].mlp.down_proj.weight)
    assert np.array_equal(found["blk.0.ffn_down.weight"], expected.astype(np.float16))
    assert "FROM ./model.gguf" in (folder / "Modelfile").read_text()


def test_a_quantized_model_keeps_its_codes_and_show_lists_them(project: Path) -> None:
    folder = _exported(project, "q4")
    report = read_report(folder / "report.toml")
    assert report["type"] == "q4_1"
    assert all(one["keeps_codes"] for one in report["tensors"] if one["type"] == "q4_1")
    assert report["largest_relative_error"] < 1e-3  # scales of fp32 in fp16
    done = mlxflow(project, "show", "export:q4", "--workflow", "export.toml")
    assert done.returncode == 0, done.stderr
    assert "blk.1.ffn_up.weight" in done.stdout
    assert "as they are" in done.stdout


ADAPTED = (
    HEAD.partition("[train]")[0]
    + """
[[train]]
name = "adapted"
method = "lora"
num_steps = 2
batch_size = 4
model = { from = "base" }
[[quantize]]
name = "q4"
model = "base"
group_size = 32
[[export]]
name = "peft"
model = "train:adapted"
format = "peft"
base_model = "owner/base"
[[export]]
name = "llama"
model = "train:adapted"
format = "adapter-gguf"
[[export]]
name = "shards"
model = "quantize:q4"
format = "mlx"
max_shard_size = "30 KB"
"""
)


def test_adapters_and_shards_are_written_with_cards(project: Path) -> None:
    base = project / "base"
    shutil.copytree(project / "artifacts/train", base)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: owner/base\n---\n")
    (project / "adapters.toml").write_text(ADAPTED)
    done = mlxflow(project, "build", "--workflow", "adapters.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {name: project / "artifacts/export" / name for name in ("peft", "llama", "shards")}
    config = json.loads((folders["peft"] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 160.0, "owner/base")
    assert (folders["llama"] / "adapter.gguf").is_file()
    assert len(list(folders["shards"].glob("model-*-of-*.safetensors"))) > 1
    assert model_folder.load(folders["shards"])[1]["quantization"]["group_size"] == 32
    made = {**folders, "train": project / "artifacts/train/adapted", "quantize": project / "artifacts/quantize/q4"}
    for folder in made.values():
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: mit\nbase_model: owner/base\n")
        assert str(project) not in card
    assert 'model = PeftModel.from_pretrained(model, "FOLDER")' in (folders["peft"] / "README.md").read_text()
    assert "| last_validation_perplexity | " in (made["train"] / "README.md").read_text()


def test_adapters_of_a_model_without_any_are_refused_before_anything_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    Path("export.toml").write_text(HEAD + '[export]\nformat = "peft"\n')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("export.toml"))
    assert str(caught.value) == (
        'export.toml: export.model = "train": has no adapters. Train it with method = "lora", or set format = "mlx".'
    )


def test_only_a_changed_model_or_table_makes_it_stale(job: Path) -> None:
    (job / "workflow.toml").write_text(HEAD + EXPORTS)
    assert doit(job, "export").returncode == 0
    assert {line[:2] for line in doit(job, "export").stdout.splitlines()} == {"--"}  # nothing is stale
    (job / "workflow.toml").write_text(HEAD + EXPORTS.replace('model = "quantize:q4"', 'model = "quantize:q8"'))
    plan = doit(job, "plan", "export").stdout
    assert "export:q4" in plan
    assert "export:dense" not in plan


def test_an_empty_workflow_exports_nothing(tmp_path: Path) -> None:
    (tmp_path / "workflow.toml").write_text("")
    names = [one.name for one in load_workflow(tmp_path / "workflow.toml").stages]
    assert "train" in names
    assert "export" not in names


def test_an_architecture_without_a_name_is_refused_before_anything_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    base = tmp_path / "base"
    base.mkdir()
    for file in (project / "artifacts/train").iterdir():
        if file.is_file():
            (base / file.name).write_bytes(file.read_bytes())
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"llama"', '"mamba2"'))
    text = HEAD + '[[export]]\nname = "a"\nmodel = "train"\n[[export]]\nname = "b"\nmodel = "BASE"\n'
    text = text.replace("[train.model]\n", '[train.model]\nfrom = "BASE"\n').replace("BASE", str(base))
    for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
        text = "\n".join(line for line in text.splitlines() if not line.startswith(key))
    (project / "refused.toml").write_text(text)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("refused.toml"))
    told = 'is of the architecture "mamba2", which cannot be written as GGUF. Known: llama, '
    names = {"export[0]": "train", "export[1]": str(base)}
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for (table, model), line in zip(names.items(), lines, strict=True):
        assert line.startswith(f'refused.toml: {table}.model = "{model}": {told}')


def test_a_missing_package_is_named_before_anything_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    Path("export.toml").write_text(HEAD + '[export]\nmodel = "train"\n')
    monkeypatch.setattr(Disk, "has_package", lambda *_: False)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("export.toml"))
    assert str(caught.value) == ("export.toml: export.format = \"gguf\": needs gguf. Run: pip install 'mlxflow[gguf]'.")
