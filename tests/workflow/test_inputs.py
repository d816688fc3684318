from pathlib import Path

import msgspec
import pytest

from mlxflow.data.sources import Corpus
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.inputs import References
from mlxflow.workflow.stage_references import Known

MADE = {
    "pretokenize": {"train.safetensors"},
    "train": {"model.safetensors", "config.json"},
    "quantize:q4": {"model.safetensors"},
    "quantize:q8": {"model.safetensors"},
    "profile:only": {"report.toml"},
}


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def references(tmp_path: Path, lines: list[str]) -> References:
    known = Known()
    for task, files in MADE.items():
        known.add(task, msgspec.defstruct("Table", [])(), files)
    return References(Disk(tmp_path), known, {"model", "models"}, set(), set(), "w.toml", "report", lines)


def test_a_stage_s_name_stands_for_its_only_variant(references: References) -> None:
    assert references.folder("train", "model") == Path("artifacts/train")
    assert references.folder("profile", "profile") == Path("artifacts/profile/only")
    assert references.folder("quantize:q4", "model") == Path("artifacts/quantize/q4")


def test_a_star_stands_for_every_variant(references: References, lines: list[str]) -> None:
    assert references.expand(("train", "quantize:*"), "models") == ("train", "quantize:q4", "quantize:q8")
    assert references.expand(("train", "train"), "models") == ("train",)
    assert lines == []
    references.expand(("benchmark:*",), "models")
    assert lines == [
        'w.toml: report.models = "benchmark:*": no stage before this one makes it. '
        "Known: pretokenize, train, quantize:q4, quantize:q8, profile:only."
    ]


def test_a_reference_to_a_stage_without_the_file_lists_the_stages_that_make_it(
    references: References, lines: list[str]
) -> None:
    file = references.folder("pretokenize", "model") / "model.safetensors"
    references.check_makers([file])
    assert lines == [
        'w.toml: report.model = "pretokenize": makes no model.safetensors. Known: train, quantize:q4, quantize:q8.'
    ]


def test_a_reference_to_a_stage_of_several_variants_lists_them(references: References, lines: list[str]) -> None:
    file = references.folder("quantize", "model") / "model.safetensors"
    references.check_makers([file])
    assert lines == [
        'w.toml: report.model = "quantize": expected one of its variants. Write "quantize:q4" or "quantize:q8".'
    ]


def test_sources_are_files_and_built_in_corpora(references: References, tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("text")
    (tmp_path / "empty.txt").touch()
    assert references.sources(("notes", "hf:owner/name"), "sources") == (Path("notes/a.txt"), Corpus("hf:owner/name"))
    assert lines == []
    references.sources(("empty.txt", "none.txt", "builtin:none"), "sources")
    assert [line.split(": ", 1)[1].split(". ")[0] for line in lines] == [
        'report.sources = "empty.txt": is empty',
        'report.sources = "none.txt": names no file',
        'report.sources = "builtin:none": no such built-in corpus',
    ]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ('{"model_type": "llama"}', "dense"),
        ('{"model_type": "llama", "quantization": {"group_size": 32, "bits": 4}}', "quantized"),
        ("[]", "unknown"),
        (None, "hub"),
    ],
)
def test_kind_of_model(references: References, tmp_path: Path, config: str | None, kind: str) -> None:
    if config is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base/config.json").write_text(config)
    assert references.kind_of_model("base" if config is not None else "owner/name") == kind
