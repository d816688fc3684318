"""Settings of a workflow held against the architecture of a model folder."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from mlxflow.cli.check import check_plans
from mlxflow.messages.errors import WorkflowError
from mlxflow.models import model_folder
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from tests.conftest import mlxflow

TRAIN = """
[pretokenize]
sources = ["notes.jsonl"]
context_length = 31
packing = "PACKING"
tokenizer = { vocab_size = 300 }
[train]
num_steps = 1
batch_size = 2
document_mask = true
model = { from = "gpt2" }
"""


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder with short texts and a small model with absolute positions, and with the tokenizer of the texts."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": f"note {i} of many"}) + "\n" for i in range(60)))
    shape = {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    config = {"model_type": "gpt2", "vocab_size": 300, **shape}
    (folder / "gpt2").mkdir()
    model_folder.save(
        model=model_folder.build(config, seed=0),
        config=config,
        config_file=folder / "gpt2/config.json",
        model_file=folder / "gpt2/model.safetensors",
        provenance={},
    )
    return folder


def _load(folder: Path, packing: str) -> Workflow:
    path = folder / "workflow.toml"
    path.write_text(TRAIN.replace("PACKING", packing))
    return load_workflow(path)


def _pretokenize(workflow: Workflow) -> None:
    """Make the tokens, and give the model their tokenizer."""
    tokens = execute_stage(workflow, workflow.find("pretokenize"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / name, workflow.root / "gpt2")


def test_a_document_mask_unsupported_by_the_base_model_is_found_by_check(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gpt2)
    workflow = _load(Path(), "best-fit")
    with pytest.raises(WorkflowError) as caught:
        check_plans(workflow)
    assert str(caught.value) == (
        "workflow.toml: train.document_mask = true: gpt2 counts positions through the whole row. "
        'Set document_mask = false, or pretokenize.packing = "none".'
    )


def test_the_advice_about_a_document_mask_names_the_table_of_the_tokens(gpt2: Path) -> None:
    text = TRAIN.replace("PACKING", "best-fit").replace("[pretokenize]", '[[pretokenize]]\nname = "a"')
    (gpt2 / "workflow.toml").write_text(text.replace("[train]", '[train]\ninput = "pretokenize:a"'))
    with pytest.raises(WorkflowError) as caught:
        check_plans(load_workflow(gpt2 / "workflow.toml"))
    assert str(caught.value).endswith('Set document_mask = false, or pretokenize[0].packing = "none".')


def test_a_document_mask_unsupported_by_the_model_is_a_workflow_error(gpt2: Path, tmp_path: Path) -> None:
    workflow = _load(gpt2, "best-fit")
    _pretokenize(workflow)
    with pytest.raises(WorkflowError) as caught:
        execute_stage(workflow, workflow.find("train"), tmp_path / "into")
    assert str(caught.value) == (
        "train.document_mask = true: this architecture counts positions through the whole row and cannot keep the "
        'documents in it apart. Set train.document_mask = false, or pretokenize.packing = "none".'
    )


def test_rows_of_one_document_each_need_no_document_mask(gpt2: Path, tmp_path: Path) -> None:
    workflow = _load(gpt2, "none")
    check_plans(workflow)
    _pretokenize(workflow)
    assert (
        "document_mask = false"
        in (execute_stage(workflow, workflow.find("train"), tmp_path / "into") / "report.toml").read_text()
    )


def test_check_prints_the_workflow_with_every_default(job: Path) -> None:
    result = mlxflow(job, "check")
    assert result.returncode == 0, result.stderr
    resolved = tomllib.loads(result.stdout)
    assert resolved["train"]["num_steps"] == 20
    assert resolved["train"]["max_grad_norm"] == 1.0
    assert [variant["name"] for variant in resolved["quantize"]] == ["q4", "q8"]


def test_check_prints_every_error_and_exits_with_2(job: Path) -> None:
    (job / "workflow.toml").write_text("[train]\nnum_step = 1\n[profile]\nnum_steps = 0\n")
    result = mlxflow(job, "check")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "workflow.toml: train.num_step: unknown key. Did you mean train.num_steps?",
        "workflow.toml: profile.num_steps = 0: expected a whole number from 1 to 1_000_000_000. "
        "Use profile.num_steps = 20 (the default) or remove the key.",
    ]
