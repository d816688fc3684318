"""GGUF files in the place of model folders: in train.model.from, quantize.model, export.model and generate."""

import re
import shutil
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.models import gguf_reading, gguf_writing
from mlxflow.models.gguf_writing import GgufRequest
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.loader import load_workflow
from tests.conftest import doit, mlxflow

WORKFLOW = """
[pretokenize]
sources = ["notes"]
packing = "best-fit"

[train]
model = { from = "base.gguf" }
num_steps = 2
batch_size = 2
eval_every = 0
max_validation_rows = 4

[[quantize]]
name = "own"
model = "base.gguf"
group_size = 32

[[export]]
name = "again"
model = "base.gguf"
type = "f16"
"""


@pytest.fixture
def job(built: Path, tmp_path: Path) -> Path:
    """A project with the trained model of the tiny workflow as a GGUF file of fp16 numbers."""
    folder = tmp_path / "job"
    folder.mkdir()
    shutil.copytree(built / "notes", folder / "notes")
    shutil.copy(Path(__file__).parents[2] / "dodo.py", folder)
    request = GgufRequest("f16", "auto", "tiny", "", "train")
    gguf_writing.write(built / "artifacts/train", folder / "base.gguf", request)
    (folder / "workflow.toml").write_text(WORKFLOW)
    return folder


def _weights(folder: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))


def test_stages_read_a_gguf_file_like_a_model_folder(job: Path, built: Path, tmp_path: Path) -> None:
    done = doit(job, "train", "quantize", "export")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"base.gguf"' in (job / "mlxflow.lock").read_text()
    assert "/gguf/" not in (job / "mlxflow.lock").read_text()  # nothing of this machine
    pretokenized = read_report(job / "artifacts/pretokenize/report.toml")
    tokenizers = [(root / "artifacts/pretokenize/tokenizer.json").read_text().count("Ġthing") for root in (job, built)]
    assert tokenizers[0] == tokenizers[1] > 0
    assert pretokenized["train"]["tokens"] > 0
    trained, before = _weights(job / "artifacts/train"), _weights(built / "artifacts/train")
    assert trained.keys() == before.keys()
    assert all(mx.allclose(trained[name], before[name], rtol=0.05, atol=0.02).item() for name in before)
    figures = read_report(job / "artifacts/train/report.toml")
    own = read_report(built / "artifacts/train/report.toml")["last_validation_perplexity"]
    assert figures["first_validation_perplexity"] == pytest.approx(own, rel=0.5)  # not that of a new model, 460
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_reading.write_folder(job / "base.gguf", folder, key="base.gguf")
    (job / "other.toml").write_text(f'[quantize]\nmodel = "{folder}"\ngroup_size = 32\n')
    assert mlxflow(job, "build", "--workflow", "other.toml").returncode == 0
    one, other = _weights(job / "artifacts/quantize/own"), _weights(job / "artifacts/quantize")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    assert (job / "artifacts/export/again/model.gguf").stat().st_size == (job / "base.gguf").stat().st_size


def test_another_file_of_the_name_makes_the_stages_stale(job: Path) -> None:
    text = '[quantize]\nmodel = "base.gguf"\ngroup_size = 32\n'
    (job / "workflow.toml").write_text(text)
    assert doit(job).returncode == 0
    assert doit(job).stdout == "-- quantize\n"
    folder = gguf_reading.folder_of([job / "base.gguf"], key="base.gguf")
    gguf_writing.write(folder, job / "base.gguf", GgufRequest("q8_0", "auto", "tiny", "", "base"))
    assert "base.gguf" in doit(job, "plan").stdout


def test_generate_continues_with_a_gguf_file_what_the_folder_does(job: Path, built: Path) -> None:
    call = ("generate", "--prompt", "note 3 line", "--max-tokens", "12")
    found, expected = mlxflow(job, *call, "base.gguf"), mlxflow(built, *call, "artifacts/train")
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout
    assert re.search(r"base\.gguf: converted to \S+, [\d.]+ [kM]B; it is used again", found.stderr)
    assert "converted" not in mlxflow(job, *call, "base.gguf").stderr  # once


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a model", "is no GGUF file, or is damaged. Known: llama, qwen2,"),
        (None, "no such file. Name a GGUF file, a model folder, or a hub id."),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path("base.gguf").write_bytes(data)
    Path("workflow.toml").write_text('[quantize]\nmodel = "base.gguf"\n')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value).startswith(f'workflow.toml: quantize.model = "base.gguf": {message}')


def test_generate_refuses_a_damaged_file_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + bytes(100))
    done = mlxflow(tmp_path, "generate", "base.gguf", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("base.gguf: cannot be read as GGUF (")
    assert len(done.stderr.splitlines()) == 1
