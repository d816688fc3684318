"""The whole of pretokenizing, on real files: formats, the cache, sides, and what cannot be used."""

import csv
import gzip
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from mlxflow.data.token_file import TokenFile
from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
from mlxflow.data.tokenizer_folder import save_vocabulary
from mlxflow.messages.errors import MlxflowError, SourceError, WorkflowError
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import mlxflow, rest_in_matrix

# What is advised on a record without any known key
_NAME_KEYS = 'Name its keys "messages", "prompt" and "completion", or "text", or set text_key'

TEXTS = [f"note {i}: the {i * 7 % 13}th thing to remember, and {i * i} more of it\n" * 3 for i in range(40)]

TRAINING = """
[train]
num_steps = 2
batch_size = 2
max_validation_rows = 4
[profile]
num_steps = 2
batch_size = 2
suggestions = false
[benchmark]
num_steps = 2
convergence_steps = 0
batch_sizes = [2]
models = ["train"]
max_validation_rows = 4
[train.model]
hidden_size = 32
num_heads = 2
num_kv_heads = 2
intermediate_size = 32
"""


class Job:
    """A folder with a workflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifact = folder / "artifacts/pretokenize"

    def configure(self, text: str) -> None:
        settings = text if "context_length" in text else f"context_length = 16\n{text}"
        tokenizer = "" if "tokenizer" in text else "\ntokenizer = { vocab_size = 300 }"
        (self.folder / "workflow.toml").write_text(f"[pretokenize]\n{settings}{tokenizer}\n{TRAINING}")

    def run(self, text: str | None = None, stage: str = "pretokenize") -> dict[str, Any]:
        """Run a stage in this process and return its report."""
        if text is not None:
            self.configure(text)
        workflow = load_workflow(self.folder / "workflow.toml")
        return read_report(execute_stage(workflow, workflow.find(stage)) / "report.toml")

    def fails(self, text: str) -> str:
        """Run pretokenize, which must refuse, and return what it says."""
        with pytest.raises(MlxflowError) as caught:
            self.run(text)
        assert not self.artifact.exists()
        assert isinstance(caught.value, SourceError | WorkflowError)
        return str(caught.value)

    def texts(self, side: str = "train") -> list[str]:
        """Return the documents of a side as they decode."""
        tokenizer = Tokenizer.from_file(str(self.artifact / "tokenizer.json"))
        documents = TokenFile.open(self.artifact / f"{side}.safetensors").documents()
        return [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in documents]

    def bytes(self) -> dict[str, bytes]:
        """Return the artifact without what may differ between equal runs."""
        files = {path.name: path.read_bytes() for path in self.artifact.iterdir() if path.name != "report.toml"}
        report = read_report(self.artifact / "report.toml")
        del report["run"]
        return files | {"report.toml": json.dumps(report).encode()}


class _InProcess:
    """A guard that watches nothing: what the stage does is tested without its process, see tests/data/test_guard.py."""

    def __enter__(self) -> "_InProcess":
        return self

    def __exit__(self, *error: object) -> None: ...

    def call(self, name: str, *values: Any) -> Any:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)(*values)

    def end(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.data.guard.Guard", _InProcess)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def _conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"What is {number} and one?"},
        {"role": "assistant", "content": f"It is {number + 1}."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Quite."},
    ]


def _write_jsonl(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_folder(folder: Path) -> str:
    for number, text in enumerate(TEXTS):
        (folder / "notes" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (folder / "notes" / str(number % 3) / f"{number:02}.md").write_text(text)
    return "notes"


def _write_compressed(folder: Path, name: str, compress: Callable[[bytes], bytes]) -> str:
    plain = folder / "plain.jsonl"
    _write_jsonl(plain, [{"text": text} for text in TEXTS])
    (folder / name).write_bytes(compress(plain.read_bytes()))
    return name


def _write_jsonl_of_texts(folder: Path) -> str:
    _write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    return "a.jsonl"


def _write_json(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return "a.json"


def _write_csv(folder: Path) -> str:
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *enumerate(TEXTS)])
    return "a.csv"


def _write_parquet(folder: Path) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "id": range(len(TEXTS))}), folder / "a.parquet")
    return "a.parquet"


def _write_data_set(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "set"))
    return "hf:set"


SOURCES: dict[str, Callable[[Path], str]] = {
    "folder": _write_folder,
    "jsonl": _write_jsonl_of_texts,
    "jsonl.gz": lambda folder: _write_compressed(folder, "a.jsonl.gz", gzip.compress),
    "jsonl.zst": lambda folder: _write_compressed(folder, "a.jsonl.zst", zstandard.ZstdCompressor().compress),
    "json": _write_json,
    "csv": _write_csv,
    "parquet": _write_parquet,
    "data set": _write_data_set,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_of_each_format_is_tokenized(job: Job, kind: str) -> None:
    source = SOURCES[kind](job.folder)
    report = job.run(f'sources = ["{source}"]\nholdout = 0.2')
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS)
    assert report["sources"][0]["documents"] == 40
    assert report["sources"][0]["text_bytes"] == sum(map(len, TEXTS))
    assert job.run(stage="train")["tokens"] > 0


@pytest.mark.parametrize("kind", rest_in_matrix(["chat", "completions"], "chat"))
def test_conversations_are_tokenized_with_masks_for_loss_and_documents(job: Job, kind: str) -> None:
    records: list[Any] = [{"messages": _conversation(i)} for i in range(40)]
    if kind == "completions":
        records = [{"prompt": f"What is {i} and one?", "completion": f"It is {i + 1}."} for i in range(40)]
    _write_jsonl(job.folder / "a.jsonl", records)
    job.run('sources = ["a.jsonl"]\ncontext_length = 96')
    opened = TokenFile.open(job.artifact / "train.safetensors")
    tokenizer = Tokenizer.from_file(str(job.artifact / "tokenizer.json"))
    trained = [
        tokenizer.decode(np.array(opened.rows.tokens[row])[np.array(opened.rows.marks[row] & 1) > 0].tolist(), False)
        for row in range(opened.rows.num_rows)
    ]
    answers = "".join(trained)
    assert "What is" not in answers
    assert "Be short" not in answers
    assert answers.count("It is") == len(opened.documents())
    assert answers.count("<|im_end|>") == len(opened.documents()) * (2 if kind == "chat" else 1)
    assert job.run(stage="train")["document_mask"] is True
    assert job.run(stage="profile")["num_steps"] == 2
    measured = job.run(stage="benchmark")["models"][0]
    assert measured["perplexity"] == pytest.approx(
        read_report(job.folder / "artifacts/train/report.toml")["last_validation_perplexity"], rel=1e-4
    )
    everything = job.run('sources = ["a.jsonl"]\ncontext_length = 96\ntrain_on = "all"')
    assert everything["train"]["targets"] > 2 * opened.targets


def test_the_template_of_the_workflow_is_used(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"messages": _conversation(i)} for i in range(40)])
    (job.folder / "own.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    job.run('sources = ["a.jsonl"]\nchat_template = "own.jinja"\ncontext_length = 96\ntokenizer.vocab_size = 310')
    assert json.loads((job.artifact / "tokenizer_config.json").read_text())["chat_template"].startswith("{% for m")
    before = (job.artifact / "train.safetensors").read_bytes()
    (job.folder / "own.jinja").write_text((job.folder / "own.jinja").read_text().replace("<|end|>", "<|over|>"))
    job.run()
    assert (job.artifact / "train.safetensors").read_bytes() != before


def test_a_folder_made_for_mlx_lm_keeps_its_split(job: Job) -> None:
    (job.folder / "data").mkdir()
    for name, texts in (("train", TEXTS[:30] + TEXTS[-1:]), ("valid", TEXTS[30:36]), ("test", TEXTS[36:])):
        _write_jsonl(job.folder / f"data/{name}.jsonl", [{"text": text} for text in texts])
    report = job.run('sources = ["data"]')
    assert sorted(job.texts()) == sorted(TEXTS[:30])  # one was in the test file too
    assert sorted(job.texts("validation")) == sorted(TEXTS[30:36])
    assert (report["duplicates"], report["test_documents"]) == (1, 4)


SIDES: dict[str, dict[str, str]] = {
    "JSONL": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test_gen.jsonl"},
    "a name for each word": {"train": "set_train.jsonl", "validation": "set_DEV.jsonl", "test": "set-test-2.jsonl"},
    "shards in a folder": {
        "train": "data/train-00000-of-00001.jsonl",
        "validation": "data/validation_matched-00000-of-00001.jsonl",
        "test": "data/test-00000-of-00001.jsonl",
    },
    "folders": {"train": "train/0.jsonl", "validation": "held-out/0.jsonl", "test": "test/0.jsonl"},
    "evaluation": {"train": "records.jsonl", "validation": "eval.jsonl", "test": "Test.jsonl"},
    "texts": {"train": "wiki.train.txt", "validation": "wiki.valid.txt", "test": "wiki.test.txt"},
}


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("source", ["d", "d/**/*.*"])
def test_file_names_decide_between_training_and_validation(job: Job, kind: str, source: str) -> None:
    parts = {"train": TEXTS[:20], "validation": TEXTS[20:26], "test": TEXTS[26:]}
    for side, name in SIDES[kind].items():
        path = job.folder / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "texts":
            parts[side] = ["".join(parts[side])]
            path.write_text(parts[side][0])
        else:
            _write_jsonl(path, [{"text": text} for text in parts[side]])
    report = job.run(f'sources = ["{source}"]')
    assert sorted(job.texts()) == sorted(parts["train"])
    assert sorted(job.texts("validation")) == sorted(parts["validation"])
    assert report["test_documents"] == len(parts["test"])
    names = {side: f"d/{name}" for side, name in SIDES[kind].items()}
    assert report["warnings"] == [
        f"kept out of training, a test side by name: {names['test']} (used only to find duplicates)",
        f"kept out of training, a validation side by name: {names['validation']} (used for validation)",
    ]
    assert (report["test_files"], report["validation_files"]) == ([names["test"]], [names["validation"]])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("name", ["val", "dev-0001", "eval"])
def test_a_file_named_validation_is_held_out_in_every_container(job: Job, suffix: str, name: str) -> None:
    for stem, texts in ((name, TEXTS[:5]), ("train", TEXTS[5:])):
        _write_container(job.folder / f"d/{stem}.{suffix}", texts)
    job.run('sources = ["d"]')
    assert sorted(job.texts("validation")) == sorted(TEXTS[:5])
    assert sorted(job.texts()) == sorted(TEXTS[5:])


def _write_container(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    else:
        path.write_bytes(zstandard.ZstdCompressor().compress(lines) if path.suffix == ".zst" else lines)


def test_without_anything_for_validation_a_share_of_the_training_file_is_held_out(job: Job) -> None:
    _write_container(job.folder / "d/train.jsonl", TEXTS[:35])
    _write_container(job.folder / "d/test.jsonl", TEXTS[35:])
    report = job.run('sources = ["d"]\nholdout = 0.2')
    trained, held_out = job.texts(), job.texts("validation")
    assert sorted(trained + held_out) == sorted(TEXTS[:35])
    assert 2 < len(held_out) < 15
    assert report["warnings"] == [
        "kept out of training, a test side by name: d/test.jsonl (used only to find duplicates)"
    ]


def test_an_empty_validation_file_holds_nothing_out(job: Job) -> None:
    _write_container(job.folder / "d/train.jsonl", TEXTS[1:])
    _write_container(job.folder / "d/valid.jsonl", [" "])
    job.run('sources = ["d"]\nholdout = 0.2')
    assert len(job.texts("validation")) > 2
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS[1:])


@pytest.mark.parametrize("source", ["d/test.jsonl", "d/test*.jsonl", "d/*test*"])
def test_a_test_file_named_in_sources_is_trained_on_with_a_warning(job: Job, source: str) -> None:
    _write_container(job.folder / "d/test.jsonl", TEXTS)
    report = job.run(f'sources = ["{source}"]\nholdout = 0.2')
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS)
    assert report["warnings"] == [
        f"{source} is trained on because pretokenize.sources[0] names it, though its name says test"
    ]


def test_messages_about_a_variant_name_its_own_keys(job: Job) -> None:
    _write_container(job.folder / "d/test.jsonl", TEXTS[:20])
    _write_container(job.folder / "e/valid.jsonl", TEXTS[20:])
    keys = 'name = "x"\nsources = ["d/test.jsonl"]\nvalidation_sources = ["e"]'
    shape = "context_length = 16\ntokenizer = { vocab_size = 300 }"
    (job.folder / "workflow.toml").write_text(f"[[pretokenize]]\n{keys}\n{shape}\n")
    assert job.run(stage="pretokenize:x")["warnings"] == [
        "d/test.jsonl is trained on because pretokenize:x.sources[0] names it, though its name says test"
    ]
    (job.folder / "e/valid.jsonl").write_bytes(b"{")
    with pytest.raises(SourceError) as caught:
        job.run(stage="pretokenize:x")
    assert "pretokenize:x.on_bad_record" in str(caught.value)
    config: Any = load_workflow(job.folder / "workflow.toml").find("pretokenize:x").config
    assert [config.place(number) for number in range(2)] == ["sources[0]", "validation_sources[0]"]


def test_a_file_of_two_sources_belongs_to_the_one_that_names_it_or_is_for_validation(job: Job) -> None:
    _write_container(job.folder / "d/a.jsonl", TEXTS[:20])
    _write_container(job.folder / "d/b.jsonl", TEXTS[20:30])
    _write_container(job.folder / "d/c/e.jsonl", TEXTS[30:])
    job.run('sources = ["d"]\nvalidation_sources = ["d/c"]')
    assert sorted(job.texts("validation")) == sorted(TEXTS[30:])
    assert sorted(job.texts()) == sorted(TEXTS[:30])
    job.run('sources = ["d/a.jsonl"]\nvalidation_sources = ["d"]')
    assert sorted(job.texts()) == sorted(TEXTS[:20])
    report = job.run('sources = ["d", { path = "d/b.jsonl", weight = 3 }]')
    assert [source["documents"] for source in report["sources"]] == [30, 10]


def test_from_a_validation_source_only_the_validation_part_is_read(job: Job) -> None:
    for stem, texts in (("train", TEXTS[:20]), ("test", TEXTS[20:])):
        _write_container(job.folder / f"d/{stem}.jsonl", texts)
    job.run('sources = ["d"]\nvalidation_sources = ["d"]')
    assert sorted(job.texts()) == sorted(TEXTS[:20])
    assert sorted(job.texts("validation")) == sorted(TEXTS[20:])


# --- few documents


@pytest.mark.parametrize("holdout", [0.02, 0.5, 0.9])
def test_a_single_text_is_split_with_its_end_held_out(job: Job, holdout: float) -> None:
    text = " ".join(f"word{i}" for i in range(400))
    (job.folder / "a.txt").write_text(text)
    report = job.run(f'sources = ["a.txt"]\nholdout = {holdout}')
    (trained,), (held_out,) = job.texts(), job.texts("validation")
    assert text.startswith(trained)
    assert text.endswith(held_out)
    assert 0 <= len(text) - len(trained) - len(held_out) < 9  # a last token, alone in its row, is left out
    tokens = report["validation"]["tokens"]
    assert report["warnings"] == [
        f"no whole document can be held out: validation is the end of the only document, {tokens:,} tokens"
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_if_all_hashes_fall_into_validation_one_text_is_held_out(job: Job, count: int) -> None:
    (job.folder / "n").mkdir()
    for number, text in enumerate(TEXTS[:count]):
        (job.folder / f"n/{number}.txt").write_text(text)
    job.run('sources = ["n"]\nholdout = 0.999999')
    assert len(job.texts()) == count - 1
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS[:count])


def test_equal_documents_have_the_same_end_held_out(job: Job) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    _write_container(job.folder / "a.jsonl", [text] * 5)
    report = job.run('sources = ["a.jsonl"]\ndeduplicate = false\nholdout = 0.1')
    (trained,), (held_out,) = set(job.texts()), set(job.texts("validation"))
    assert trained + held_out == text
    assert report["warnings"][0].startswith("no whole document can be held out: validation is the end of each document")


# --- data sets


@pytest.fixture
def data_sets(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job beside a data set of two configurations, each with splits."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(job.folder / "cache"))
    pytest.importorskip("datasets")
    metadata = ["---", "configs:"]
    for config, texts in (("one", TEXTS[:20]), ("two", TEXTS[20:])):
        metadata += [f"- config_name: {config}", "  data_files:"]
        for split, rows in (("train", texts[:15]), ("test_sft", texts[15:])):
            (job.folder / f"set/{config}").mkdir(parents=True, exist_ok=True)
            _write_jsonl(job.folder / f"set/{config}/{split}.jsonl", [{"text": text} for text in rows])
            metadata += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (job.folder / "set/README.md").write_text("\n".join([*metadata, "---"]))
    return job


def test_entries_name_configurations_splits_and_slices_of_one_data_set(data_sets: Job) -> None:
    report = data_sets.run(
        'sources = [{ path = "hf:set", config = "one" }, { path = "hf:set", config = "two", split = "train[:20%]" }]\n'
        'validation_sources = [{ path = "hf:set", config = "two", split = "test_sft[1:3]" }]'
    )
    assert sorted(data_sets.texts()) == sorted([*TEXTS[:15], *TEXTS[20:23]])
    assert sorted(data_sets.texts("validation")) == sorted(TEXTS[36:38])
    assert report["test_files"] == ["hf:set/test_sft"]
    assert (data_sets.artifact / "files.txt").read_text().splitlines() == [
        "hf:set/train[0:15]",
        "hf:set/test_sft[0:5]",
        "hf:set/train[0:3]",
        "hf:set/test_sft[1:3]",
    ]


def test_a_test_split_named_in_sources_is_trained_on_with_a_warning(data_sets: Job) -> None:
    report = data_sets.run('sources = [{ path = "hf:set", config = "one", split = "train+test_sft" }]\nholdout = 0.1')
    assert sorted(data_sets.texts() + data_sets.texts("validation")) == sorted(TEXTS[:20])
    assert report["warnings"] == [
        "hf:set, split train+test_sft, is trained on because pretokenize.sources[0] names it, though its name says test"
    ]


def test_slices_apply_to_saved_data_sets(job: Job) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"train": TEXTS[:30], "dev": TEXTS[30:35], "test": TEXTS[35:]}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in rows.items()}
    datasets.DatasetDict(made).save_to_disk(str(job.folder / "set"))
    job.run('sources = ["hf:set"]')
    assert (sorted(job.texts()), sorted(job.texts("validation"))) == (sorted(TEXTS[:30]), sorted(TEXTS[30:35]))
    job.run('sources = [{ path = "hf:set", split = "train[-10:]" }]\nvalidation_sources = ["hf:set"]')
    assert (sorted(job.texts()), sorted(job.texts("validation"))) == (sorted(TEXTS[20:30]), sorted(TEXTS[30:35]))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('path = "hf:set"', 'hf:set: has the configurations one, two. Name one: { path = "hf:set", config = "one" }.'),
        (
            'path = "hf:set", config = "three"',
            'pretokenize.sources[0].config = "three": has no such configuration. Known: one, two.',
        ),
        (
            'path = "hf:set", config = "one", split = "tset"',
            'pretokenize.sources[0].split = "tset": has no split "tset". Known: train, test_sft.',
        ),
        (
            'path = "hf:set", config = "one", split = "train[:99]"',
            'pretokenize.sources[0].split = "train[:99]": train has 15 rows. Name existing rows.',
        ),
    ],
)
def test_missing_configurations_and_splits_are_reported_before_any_work(data_sets: Job, entry: str, said: str) -> None:
    assert data_sets.fails(f"sources = [{{ {entry} }}]") == said
    assert not list((data_sets.folder / "artifacts").glob("**/*.safetensors"))


# --- names


def test_file_names_that_are_not_utf_8_or_hold_line_breaks_are_accepted(job: Job) -> None:
    names = [b"caf\xe9.txt", b"two\nlines.txt", b"x [v2].txt", b"z.txt"]
    (job.folder / "n").mkdir()
    for name, text in zip(names, TEXTS, strict=False):
        with open(os.path.join(os.fsencode(job.folder / "n"), name), "w") as file:  # noqa: PTH118, PTH123
            file.write(text)
    job.run('sources = ["n"]\nholdout = 0.3')
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS[:4])
    lines = (job.artifact / "files.txt").read_text().splitlines()
    assert lines == ["n/caf\\xe9.txt", "n/two\\nlines.txt", "n/x [v2].txt", "n/z.txt"]
    tokenizer = Tokenizer.from_file(str(job.artifact / "tokenizer.json"))
    shown: dict[str, str] = {}
    for side in ("train", "validation"):
        opened = TokenFile.open(job.artifact / f"{side}.safetensors")
        texts = [tokenizer.decode(ids.tolist()) for ids in opened.documents()]
        shown |= {lines[opened.place(number)[0]]: text for number, text in enumerate(texts)}
    assert shown == dict(zip(lines, TEXTS, strict=False))


def test_a_folder_with_brackets_and_links_in_circles_is_read_once(job: Job) -> None:
    (job.folder / "x [v2]/deep").mkdir(parents=True)
    _write_jsonl(job.folder / "x [v2]/deep/a.jsonl", [{"text": text} for text in TEXTS])
    (job.folder / "x [v2]/deep/again").symlink_to("..")
    (job.folder / "link").symlink_to("x [v2]")
    for source in ("x [v2]", "x [v2]/deep/*.jsonl", "link", str(job.folder / "x [v2]")):
        report = job.run(f'sources = ["{source}"]')
        assert (report["sources"][0]["files"], report["sources"][0]["documents"]) == (1, 40), source


def test_home_and_variables_are_expanded_in_data_set_paths(data_sets: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data_sets.folder))
    monkeypatch.setenv("SETS", str(data_sets.folder))
    for path in ("hf:~/set", "hf:$SETS/set"):
        data_sets.run(f'sources = [{{ path = "{path}", config = "one", split = "train" }}]')
        assert sorted(data_sets.texts() + data_sets.texts("validation")) == sorted(TEXTS[:15])


def test_configured_validation_sources_are_the_whole_validation_set(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"text": text} for text in TEXTS])
    _write_jsonl(job.folder / "b.jsonl", [{"text": text} for text in [*TEXTS[:5], "one more of them, quite new"]])
    job.run('sources = ["a.jsonl"]\nvalidation_sources = ["b.jsonl"]')
    assert sorted(job.texts()) == sorted(TEXTS[5:])
    assert sorted(job.texts("validation")) == sorted([*TEXTS[:5], "one more of them, quite new"])


def test_an_entry_may_be_a_table_with_a_weight_a_format_and_a_key(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"body": text, "text": 3} for text in TEXTS[:20]])
    _write_jsonl(job.folder / "b.jsonl", [{"text": text} for text in TEXTS[20:]])
    entry = '{ path = "a.jsonl", weight = 2.0, format = "text", text_key = "body" }'
    report = job.run(f'sources = [{entry}, "b.jsonl"]')
    first, second = report["sources"]
    opened = TokenFile.open(job.artifact / "train.safetensors")
    shown = [
        piece.document
        for row in range(opened.rows.num_rows)
        for piece in opened.pieces(row)
        if not piece.document_begin
    ]
    assert len(shown) == 2 * first["train_documents"] + second["train_documents"]
    assert [first["weight"], second["weight"]] == [2.0, 1.0]


def test_an_existing_tokenizer_is_used_and_kept_unchanged(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"text": text} for text in TEXTS])
    _save_tokenizer(job.folder / "mine", 280)
    report = job.run('sources = ["a.jsonl"]\ntokenizer.from = "mine"')
    assert report["vocab_size"] == 280
    assert (job.artifact / "tokenizer.json").read_bytes() == (job.folder / "mine/tokenizer.json").read_bytes()
    assert report["run"]["engine"] == "fastokens"


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    folder.mkdir(exist_ok=True)
    trained = train_tokenizer(TEXTS, vocab_size=vocab_size)
    save_vocabulary(
        trained_vocabulary(trained.to_str(), context_length=16, template=None),
        tokenizer_file=folder / "tokenizer.json",
        config_file=folder / "tokenizer_config.json",
    )


def test_a_hub_id_that_cannot_be_fetched_is_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _write_jsonl_of_texts(job.folder)
    said = job.fails('sources = ["a.jsonl"]\ntokenizer.from = "owner/no-such-model@1"')
    assert said.startswith('pretokenize.tokenizer.from = "owner/no-such-model@1": cannot be fetched from the hub (')
    assert said.endswith("). Name a folder, or fetch it first.")


def test_a_data_set_of_plain_files_keeps_its_splits(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(job.folder / "cache"))
    (job.folder / "set").mkdir()
    for name, texts in (("train", TEXTS[:30]), ("validation", TEXTS[30:35]), ("test", TEXTS[35:])):
        _write_jsonl(job.folder / f"set/{name}.jsonl", [{"text": text} for text in texts])
    report = job.run('sources = ["hf:set"]')
    assert sorted(job.texts()) == sorted(TEXTS[:30])
    assert sorted(job.texts("validation")) == sorted(TEXTS[30:35])
    assert report["test_documents"] == 5
    assert (job.artifact / "files.txt").read_text().splitlines()[0] == "hf:set/train[0:30]"


def test_a_worker_failure_names_the_file_being_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxflow.data.encoder import FastEncoder

    _write_folder(job.folder)
    _save_tokenizer(job.folder / "mine", 280)
    encode = FastEncoder.encode

    def fail(self: FastEncoder, texts: Any, *, special: bool) -> Any:
        if texts[0] == TEXTS[5]:
            raise RuntimeError("out of luck")
        return encode(self, texts, special=special)

    monkeypatch.setattr(FastEncoder, "encode", fail)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        job.run('sources = ["notes"]\ntokenizer.from = "mine"')
    assert caught.value.__notes__ == ["while notes/2/05.md was tokenized"]
    assert not job.artifact.exists()


def test_rows_name_their_documents(job: Job) -> None:
    _write_jsonl_of_texts(job.folder)
    (job.folder / "b.txt").write_text(TEXTS[0] + "and more")
    job.run('sources = ["a.jsonl", "b.txt"]')
    opened = TokenFile.open(job.artifact / "train.safetensors")
    named = {opened.name_rows(np.array([row])) for row in range(opened.rows.num_rows)}
    assert any("b.txt" in name for name in named)
    assert any(name.startswith("rows [0] (documents ") for name in named)
    assert any("a.jsonl:2" in name for name in named)


# --- the cache


@pytest.fixture
def cached(job: Job) -> Job:
    """A job of twenty files with a tokenizer that exists, built once."""
    (job.folder / "notes").mkdir()
    for number, text in enumerate(TEXTS[:20]):
        (job.folder / f"notes/{number:02}.txt").write_text(text)
    _save_tokenizer(job.folder / "mine", 280)
    _save_tokenizer(job.folder / "other", 270)
    (job.folder / "a.jinja").write_text("{{ messages[0].content }}")
    (job.folder / "b.jinja").write_text("{{ messages[1].content }}")
    assert job.run(CACHED)["run"]["tokenized_files"] == 20
    return job


CACHED = 'sources = ["notes"]\ntokenizer.from = "mine"'


def _edit(job: Job) -> None:
    (job.folder / "notes/03.txt").write_text("quite another text")


CHANGES: dict[str, tuple[Callable[[Job], object], int]] = {
    "nothing": (lambda job: None, 0),
    "edit": (_edit, 1),
    "rename": (lambda job: (job.folder / "notes/03.txt").rename(job.folder / "notes/zz.md"), 0),
    "touch": (lambda job: os.utime(job.folder / "notes/03.txt", (1, 1)), 0),
    "one more": (lambda job: (job.folder / "notes/20.txt").write_text("one more"), 1),
    "one less": (lambda job: (job.folder / "notes/03.txt").unlink(), 0),
    "a copy": (lambda job: shutil.copy(job.folder / "notes/03.txt", job.folder / "notes/33.txt"), 0),
    "new tokenizer": (lambda job: job.configure(CACHED.replace("mine", "other")), 20),
    "new template": (lambda job: job.configure(f'{CACHED}\nchat_template = "b.jinja"'), 20),
    "other key": (lambda job: job.configure(f'{CACHED}\ntext_key = "body"'), 20),
    "other workers": (lambda job: job.configure(f"{CACHED}\nworkers = 1"), 0),
    "other rows": (lambda job: job.configure(f"{CACHED}\ncontext_length = 24"), 0),
    "other packing": (lambda job: job.configure(f'{CACHED}\npacking = "concat"'), 0),
    "other holdout": (lambda job: job.configure(f"{CACHED}\nholdout = 0.3"), 0),
    "other weight": (lambda job: job.configure(CACHED.replace('"notes"', '{ path = "notes", weight = 3 }')), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_files_affected_by_a_change_are_tokenized_again(cached: Job, change: str) -> None:
    act, expected = CHANGES[change]
    act(cached)
    assert cached.run()["run"]["tokenized_files"] == expected
    found = cached.bytes()
    shutil.rmtree(cached.folder / "artifacts")  # what a run from nothing makes
    cached.run()
    assert cached.bytes() == found


def test_reverting_a_change_reuses_cached_shards(cached: Job) -> None:
    before, text = cached.bytes(), (cached.folder / "notes/03.txt").read_text()
    _edit(cached)
    cached.run()
    (cached.folder / "notes/03.txt").write_text(text)
    assert cached.run()["run"]["tokenized_files"] == 0
    assert cached.bytes() == before


def test_a_damaged_shard_retokenizes_only_its_file(cached: Job) -> None:
    before = cached.bytes()
    shard = next((cached.folder / "artifacts/.mlxflow/shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert cached.run()["run"]["tokenized_files"] == 1
    assert cached.bytes() == before


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_bytes_do_not_depend_on_the_number_of_workers(job: Job, workers: int) -> None:
    _write_folder(job.folder)
    _write_jsonl_of_texts(job.folder)
    settings = 'sources = ["notes", "a.jsonl"]\ndeduplicate = false\nworkers = '
    job.run(f"{settings}8")
    expected = job.bytes()
    shutil.rmtree(job.folder / "artifacts")
    job.run(f"{settings}{workers}")
    assert job.bytes() == expected


def test_the_number_of_workers_makes_no_stage_stale(job: Job) -> None:
    _write_folder(job.folder)
    digests = []
    for workers in (1, 8):
        job.configure(f'sources = ["notes"]\nworkers = {workers}')
        digests.append(load_workflow(job.folder / "workflow.toml").find("pretokenize").settings())
    assert digests[0] == digests[1]
    assert "holdout" in digests[0]["config"]


def test_a_killed_run_resumes_from_the_last_whole_shard(job: Job) -> None:
    (job.folder / "notes").mkdir()
    for number in range(300):
        (job.folder / f"notes/{number:03}.txt").write_text(f"{number} " * 20_000)
    _save_tokenizer(job.folder / "mine", 280)
    job.configure(f"{CACHED}\nworkers = 1")
    store = job.folder / "artifacts/.mlxflow/shards"
    environment = {**os.environ, "XDG_CACHE_HOME": str(job.folder / "cache")}
    command = [sys.executable, "-m", "mlxflow", "run", "pretokenize"]
    process = subprocess.Popen(command, cwd=job.folder, env=environment, stderr=subprocess.DEVNULL)
    while len(list(store.glob("*.safetensors"))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(store.glob("*.safetensors")))
    assert 5 <= done < 300
    report = job.run()
    assert report["run"]["tokenized_files"] == 300 - done
    assert not list(store.glob(".*.partial"))


def test_a_tokenizer_trained_on_a_sample_is_kept_when_documents_are_added(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"text": text} for text in TEXTS])
    settings = 'sources = ["*.jsonl"]\ntokenizer = { vocab_size = 300, max_training_bytes = 600 }'
    job.run(settings)
    before = (job.artifact / "tokenizer.json").read_bytes()
    changed = 0
    for number in range(8):
        _write_jsonl(job.folder / f"b{number}.jsonl", [{"text": f"{number} is quite another text"}])
        report = job.run()
        assert report["run"]["tokenized_files"] in (1, number + 2)
        changed += (job.artifact / "tokenizer.json").read_bytes() != before
        before = (job.artifact / "tokenizer.json").read_bytes()
    assert changed < 4


# --- what cannot be used

SKIP = 'or set pretokenize.on_bad_record = "skip".'


def _bad_record(job: Job, line: str) -> str:
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (job.folder / "a.jsonl").write_text(good + line + "\n")
    return job.fails('sources = ["a.jsonl"]')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "two"', "not valid JSON (Expecting ',' delimiter at column 15). Fix the line"),
        (
            '{"txt": "two"}',
            'has no "text" (it has txt). ' + _NAME_KEYS,
        ),
        ('{"text": null}', '"text" is null: expected text. Fix the record'),
        ('{"text": 3}', '"text" is a number: expected text. Fix the record'),
        ('["text"]', "expected an object. Fix the record"),
        ("[" * 100_000, "not valid JSON (nested too deeply). Fix the line"),
        ('{"text": "\\ud800"}', "character 0 is half of a surrogate pair. Fix the record"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no assistant turn. Fix the record"),
        ('{"messages": []}', 'expected "messages", a list that is not empty. Fix the record'),
        ('{"prompt": "a", "completion": null}', '"completion" is null: expected text. Fix the record'),
    ],
)
def test_a_bad_record_is_reported_with_its_line(job: Job, line: str, said: str) -> None:
    assert _bad_record(job, line) == f"a.jsonl:41: {said}, {SKIP}"


def test_up_to_twenty_bad_records_are_reported_at_once(job: Job) -> None:
    (job.folder / "a.jsonl").write_text("{\n" * 30)
    (job.folder / "b.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    lines = job.fails('sources = ["a.jsonl", "b.jsonl"]\ntokenizer.from = "mine"' if _mine(job) else "").splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("a.jsonl:1: not valid JSON (")
    assert lines[-1] == "and 11 more"


def _mine(job: Job) -> bool:
    _save_tokenizer(job.folder / "mine", 280)
    return True


def test_skipped_records_are_counted_and_listed(job: Job) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (job.folder / "a.jsonl").write_text(good + "{\n" + '{"text": 1}\n')
    report = job.run('sources = ["a.jsonl"]\non_bad_record = "skip"\nmax_bad_records = 0.05')
    assert report["sources"][0]["bad_records"] == 2
    assert report["bad_records"] == [
        "a.jsonl:41: not valid JSON (Expecting property name enclosed in double quotes at column 2). Fix the line",
        'a.jsonl:42: "text" is a number: expected text. Fix the record',
    ]
    assert sorted(job.texts() + job.texts("validation")) == sorted(TEXTS)


def test_too_many_skipped_records_fail_the_stage(job: Job) -> None:
    (job.folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{\n")
    said = job.fails('sources = ["a.jsonl"]\non_bad_record = "skip"')
    assert said.splitlines()[0] == (
        "pretokenize.max_bad_records = 0.01: 1 of 41 records cannot be used, a share of 0.0244. Fix them or raise it."
    )
    assert said.splitlines()[1].startswith("a.jsonl:41: not valid JSON")


def _truncated(data: bytes, name: str) -> bytes:
    compressed = gzip.compress(data) if name.endswith(".gz") else zstandard.ZstdCompressor().compress(data)
    return compressed[: len(compressed) // 2]


FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "not UTF-8": ("x.txt", lambda: b"caf\xe9 au lait", "byte 3 is not UTF-8. Save the file as UTF-8"),
    "NUL": ("x.txt", lambda: b"a" * 9000 + b"\0", "byte 9,000 is NUL. Remove it"),
    "binary": ("x.txt", lambda: b"\x7fELF\0", "byte 4 is NUL: no text. Leave the file out"),
    "truncated gzip": (
        "x.jsonl.gz",
        lambda: _truncated(json.dumps({"text": TEXTS}).encode() * 50, ".gz"),
        "ends before its gzip stream does (byte ",
    ),
    "truncated zstd": (
        "x.jsonl.zst",
        lambda: _truncated(json.dumps({"text": TEXTS}).encode() * 50, ".zst"),
        "ends before its zstd frame does (byte ",
    ),
    "no gzip": ("x.txt.gz", lambda: b"plain text", "is no valid gzip file ("),
    "bomb": (
        "x.txt.gz",
        lambda: gzip.compress(bytes(10) + b" " * 90_000_000),
        "byte 0 is NUL: no text. Leave the file out",
    ),
    "endless": ("x.txt.gz", lambda: gzip.compress(b" " * 90_000_000), "inflates to over 400 times its size ("),
    "json": ("x.json", lambda: b'[{"text": ', "not valid JSON (Expecting value at column 11). Fix the file"),
    "no parquet": ("x.parquet", lambda: b"PAR1 but no more", "is no valid parquet file ("),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_unusable_file_is_reported_or_skipped(job: Job, kind: str) -> None:
    name, make, said = FILES[kind]
    (job.folder / name).write_bytes(make())
    _write_jsonl_of_texts(job.folder)
    settings = f'sources = ["a.jsonl", "{name}"]'
    told = job.fails(settings)
    assert told.startswith(f"{name}: {said}")
    assert told.endswith(SKIP)
    report = job.run(f'{settings}\non_bad_record = "skip"\nmax_bad_records = 0.1')
    assert len(job.texts()) + len(job.texts("validation")) == 40
    assert report["bad_records"][0].startswith(f"{name}: {said}")


def test_a_table_with_an_unknown_schema_is_reported_with_its_columns(job: Job) -> None:
    _write_parquet(job.folder)
    assert job.fails('sources = ["a.parquet"]\nformat = "text"\ntext_key = "body"') == (
        f'a.parquet: has no column "body"; its columns: text, id. Name one in text_key, {SKIP}'
    )


def test_binary_and_empty_files_of_a_folder_are_skipped_and_counted(job: Job) -> None:
    _write_folder(job.folder)
    (job.folder / "notes/photo").write_bytes(b"\x89PNG\0\0")
    (job.folder / "notes/photo.png").write_bytes(b"\x89PNG\0\0")
    (job.folder / "notes/empty.txt").write_bytes(b"")
    (job.folder / "notes/blank.txt").write_bytes(b" \n\n")
    (job.folder / "notes/.hidden").write_bytes(b"hidden")
    (job.folder / "notes/nowhere").symlink_to("gone")
    source = job.run('sources = ["notes"]')["sources"][0]
    counted = [source[f"{name}_files"] for name in ("binary", "empty", "hidden")]
    assert counted == [2, 1, 1]
    assert (source["blank_documents"], source["broken_links"], source["documents"]) == (1, 1, 40)


def test_byte_order_marks_and_crlf_line_ends_are_accepted(job: Job) -> None:
    _write_folder(job.folder)
    (job.folder / "notes/windows.txt").write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    job.run('sources = ["notes"]')
    assert "first\r\nsecond\r\n" in job.texts() + job.texts("validation")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            'sources = ["short.txt"]',
            "pretokenize.sources: the train documents have 2 tokens beside the end that is held out, one row of "
            "pretokenize.context_length = 16 needs 17. Add text, or lower the context length.",
        ),
        (
            'sources = ["blank.txt"]',
            "pretokenize.sources: no document is left to train on: 1 document is blank. "
            "Name a file, a folder or a glob with text in it.",
        ),
    ],
)
def test_a_corpus_that_is_too_short_is_an_error(job: Job, settings: str, said: str) -> None:
    (job.folder / "short.txt").write_text("a b c")
    (job.folder / "blank.txt").write_text(" \n")
    assert job.fails(settings) == said


def _write_masked(folder: Path, count: int, *, template: str = "") -> None:
    """Write conversations, and a template that leaves answers out, all of them or those to a question of zero."""
    leave_out = "m.role == 'user'" + template
    (folder / "own.jinja").write_text(
        f"{{% for m in messages %}}{{% if {leave_out} %}}{{{{ m.content }}}} {{% endif %}}{{% endfor %}}"
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{i % 4} and {i}?"},
                {"role": "assistant", "content": f"{i} it is."},
            ]
        }
        for i in range(count)
    ]
    _write_jsonl(folder / "a.jsonl", records)


def test_conversations_without_a_token_to_train_on_are_left_out_and_counted(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_masked(job.folder, 40, template=" or not messages[0].content.startswith('0')")
    report = job.run('sources = ["a.jsonl"]\nchat_template = "own.jinja"\nholdout = 0.2')
    assert (report["masked_documents"], report["sources"][0]["masked_documents"]) == (10, 10)
    assert report["train"]["documents"] + report["validation"]["documents"] == 30
    assert "left out: 10 documents without a token to learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("on_long", "said"),
    [
        ("split", "; cut into several rows: 3 conversations\n"),
        ("truncate", "; cut off after one row: 3 conversations\n"),
        ("drop", "; left out: 3 conversations longer than a row\n"),
    ],
)
def test_what_happens_to_long_conversations_is_said(
    job: Job, capsys: pytest.CaptureFixture[str], on_long: str, said: str
) -> None:
    records = [{"prompt": f"{i}?", "completion": f"{i} it is, and so on. " * (40 if i < 3 else 1)} for i in range(42)]
    _write_jsonl(job.folder / "a.jsonl", records[:40])
    _write_jsonl(job.folder / "v.jsonl", records[40:])
    both = 'sources = ["a.jsonl"]\nvalidation_sources = ["v.jsonl"]'
    job.run(f'{both}\ncontext_length = 64\non_long = "{on_long}"')
    assert said in capsys.readouterr().err


NOTHING_LEFT = "pretokenize.sources: no document is left to train on: "
NAME_TEXT = "Name a file, a folder or a glob with text in it."


def _bad_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_text("[1]\n" * 40)


def _only_a_test(folder: Path) -> None:
    _write_container(folder / "d/test.jsonl", TEXTS)


def _binary(folder: Path) -> None:
    _write_container(folder / "d/x", [])
    (folder / "d/x").write_bytes(b"\x7fELF\0\1\2" * 5)
    (folder / "d/empty.txt").touch()


def _measured(folder: Path) -> None:
    _write_container(folder / "d/train.jsonl", TEXTS)
    _write_container(folder / "d/valid.jsonl", TEXTS)


NOTHING: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "masked": (
        lambda folder: _write_masked(folder, 20),
        'sources = ["a.jsonl"]\nchat_template = "own.jinja"',
        f"{NOTHING_LEFT}20 documents are without a token to train on. "
        'Fix the chat template, which leaves the answers out, or set pretokenize.train_on = "all".',
    ),
    "skipped": (
        _bad_lines,
        'sources = ["a.jsonl"]\non_bad_record = "skip"\nmax_bad_records = 1.0',
        f"{NOTHING_LEFT}40 records are skipped, the first: a.jsonl:1: expected an object. Fix the record. Fix them.",
    ),
    "kept out by name": (
        _only_a_test,
        'sources = ["d"]',
        f"{NOTHING_LEFT}40 documents are on the test side (d/test.jsonl). "
        "Name the file itself, or the split of a data set, to train on it.",
    ),
    "binary": (
        _binary,
        'sources = ["d"]',
        f"{NOTHING_LEFT}1 file is binary, with NUL bytes (d/x); 1 file is empty (d/empty.txt). {NAME_TEXT}",
    ),
    "measured": (
        _measured,
        'sources = ["d"]',
        f"{NOTHING_LEFT}40 documents are equal to others; 40 documents are on the validation side (d/valid.jsonl). "
        "Name the file itself, or the split of a data set, to train on it.",
    ),
    "duplicates": (
        lambda folder: _write_jsonl(folder / "a.jsonl", [{"text": "a b c d"}] * 20),
        'sources = ["a.jsonl"]',
        "pretokenize.sources: the train documents have 3 tokens beside the end that is held out (19 documents are "
        "equal to others), one row of pretokenize.context_length = 16 needs 17. Add text, or lower the context length.",
    ),
    "cut short": (
        lambda folder: _write_jsonl(
            folder / "a.jsonl", [{"prompt": f"{i} " * 40, "completion": f"{i} it is"} for i in range(20)]
        ),
        'sources = ["a.jsonl"]\non_long = "truncate"',
        "pretokenize.sources: no row of the train documents holds a token to train on: 19 of 19 conversations are "
        'longer than the 17 tokens of a row, and pretokenize.on_long = "truncate" leaves their answers out. '
        'Raise pretokenize.context_length, or set pretokenize.on_long = "split".',
    ),
    "dropped": (
        lambda folder: _write_jsonl(
            folder / "a.jsonl", [{"prompt": f"{i} " * 40, "completion": f"{i} it is"} for i in range(20)]
        ),
        'sources = ["a.jsonl"]\non_long = "drop"',
        "pretokenize.sources: no row of the train documents holds a token to train on: 19 of 19 conversations are "
        'longer than the 17 tokens of a row, and pretokenize.on_long = "drop" leaves them out. '
        'Raise pretokenize.context_length, or set pretokenize.on_long = "split".',
    ),
    "UTF-16": (
        lambda folder: (folder / "a.txt").write_bytes("a text of some words".encode("utf-16")),
        'sources = ["*.txt"]',
        f"a.txt: is UTF-16, not UTF-8. Save the file as UTF-8, {SKIP}",
    ),
    "validation": (
        lambda folder: (_write_jsonl_of_texts(folder), (folder / "v.txt").write_text(" \n")),
        'sources = ["a.jsonl"]\nvalidation_sources = ["v.txt"]',
        "pretokenize.validation_sources: no document is left to validate on: 1 document is blank. " + NAME_TEXT,
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_an_empty_corpus_is_reported_with_its_cause(job: Job, kind: str) -> None:
    write, settings, said = NOTHING[kind]
    write(job.folder)
    assert job.fails(settings) == said


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        (("d/a.pdf", "d/.hidden"), "d", "is a folder without text (1 hidden, 1 binary by suffix)"),
        (("d/a.txt",), "d", "all its files are empty"),
        (("d/a.txt",), "d/a.txt", "is empty"),
        (("d/a.txt",), "$NO_SUCH/a.txt", "names no file ($NO_SUCH is not set)"),
    ],
)
def test_a_source_without_readable_files_is_reported_with_the_reason(
    job: Job, files: tuple[str, ...], source: str, said: str
) -> None:
    (job.folder / "d").mkdir()
    for name in files:
        (job.folder / name).touch()
    job.configure(f'sources = ["{source}"]')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(job.folder / "workflow.toml")
    line = str(caught.value).partition("workflow.toml: ")[2]
    assert line == f'pretokenize.sources = "{source}": {said}. {NAME_TEXT}'


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            'path = "a.jsonl", split = "train"',
            'split = "train": is for a data set, and path names none. Write path = "hf:...".',
        ),
        (
            'path = "a.jsonl", config = "en"',
            'config = "en": is for a data set, and path names none. Write path = "hf:...".',
        ),
        (
            'path = "hf:owner/name", split = "train[9:3]"',
            'split = "train[9:3]": train[9:3] is empty. Change it or remove the key.',
        ),
        (
            'path = "hf:owner/name", split = "train[:1"',
            'split = "train[:1": expected splits such as "train", "train[:1%]" or "train[10:20]+validation". '
            "Change it or remove the key.",
        ),
    ],
)
def test_an_invalid_split_or_slice_is_found_by_check(job: Job, entry: str, said: str) -> None:
    _write_jsonl_of_texts(job.folder)
    job.configure(f"sources = [{{ {entry} }}]")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(job.folder / "workflow.toml")
    assert str(caught.value).partition("workflow.toml: ")[2] == f"pretokenize.sources[0].{said}"


def test_conversations_without_a_template_are_an_error(job: Job) -> None:
    _write_jsonl(job.folder / "a.jsonl", [{"messages": _conversation(i)} for i in range(4)])
    _save_tokenizer(job.folder / "mine", 280)
    assert job.fails('sources = ["a.jsonl"]\ntokenizer.from = "mine"') == (
        "a.jsonl: holds conversations, and the tokenizer has no chat template. "
        'Set pretokenize.chat_template = "FILE.jinja".'
    )


def test_roles_that_the_template_refuses_are_an_error(job: Job) -> None:
    (job.folder / "own.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    _write_jsonl(job.folder / "a.jsonl", [*({"text": text} for text in TEXTS), {"messages": _conversation(1)}])
    assert job.fails('sources = ["a.jsonl"]\nchat_template = "own.jinja"') == (
        f"a.jsonl:41: the template refuses it (System role not supported). Fix the record, {SKIP}"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            'sources = [{ path = "notes", wieght = 2 }]',
            "pretokenize.sources[0].wieght: unknown key. Did you mean pretokenize.sources[0].weight?",
        ),
        (
            'sources = ["notes", { path = "notes", weight = 0 }]',
            "pretokenize.sources[1].weight = 0: expected a number over 0 and of at most 1000. "
            "Use pretokenize.sources[1].weight = 1.0 (the default) or remove the key.",
        ),
        ("sources = [{ weight = 2 }]", "pretokenize.sources[0].path: missing. Add path to pretokenize.sources[0]."),
        (
            'tokenizer = { from = "./nowhere" }',
            'pretokenize.tokenizer.from = "./nowhere": no such folder. '
            "Name a folder with a tokenizer.json, or a hub id.",
        ),
        (
            'tokenizer = { from = "mine", vocab_size = 300 }',
            "pretokenize.tokenizer.vocab_size = 300: is for a tokenizer trained here, and tokenizer.from names one "
            "that exists. Remove one of the two.",
        ),
        (
            'chat_template = "own.jinja"',
            'pretokenize.chat_template = "own.jinja": names no file. Name one, relative to the workflow file.',
        ),
        (
            'sources = ["hf:no such thing"]',
            'pretokenize.sources = "hf:no such thing": no such folder and no data set\'s name. '
            'Write "hf:FOLDER" or "hf:OWNER/NAME@REVISION".',
        ),
        (
            'sources = ["loop"]',
            'pretokenize.sources = "loop": cannot be looked up (Too many levels of symbolic links). '
            "Name a file, a folder or a glob with text in it.",
        ),
    ],
)
def test_an_invalid_pretokenize_table_is_reported_before_any_work(job: Job, settings: str, said: str) -> None:
    _write_folder(job.folder)
    (job.folder / "loop").symlink_to("loop")
    job.configure(settings)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(job.folder / "workflow.toml")
    assert said in [line.partition("workflow.toml: ")[2] for line in str(caught.value).splitlines()]


def test_a_file_that_changes_while_it_is_read_is_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxflow.data import input_files

    _write_jsonl_of_texts(job.folder)
    _save_tokenizer(job.folder / "mine", 280)
    listed = input_files.list_files

    def list_and_edit(*arguments: Any, **settings: Any) -> Any:
        files = listed(*arguments, **settings)
        with (job.folder / "a.jsonl").open("a") as file:
            file.write('{"text": "late"}\n')
        return files

    monkeypatch.setattr(input_files, "list_files", list_and_edit)
    said = job.fails('sources = ["a.jsonl"]\ntokenizer.from = "mine"')
    assert said == f"{job.folder}/a.jsonl: changed while it was read. Run the stage again."


def test_a_tokenizer_of_a_folder_is_used_by_a_run_of_its_own(built: Path, tmp_path: Path) -> None:
    """The guarded process gets the context of a real run, which must be possible to send."""
    for name in ("train", "held"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number} of many lines\n" for number in range(200)))
    (tmp_path / "workflow.toml").write_text(
        "[pretokenize]\nsources = ['train.txt']\nvalidation_sources = ['held.txt']\ncontext_length = 8\n"
        f"tokenizer.from = '{built / 'artifacts/train'}'\n"
    )
    result = mlxflow(tmp_path, "run", "pretokenize")
    assert result.returncode == 0, result.stderr
    made = TokenFile.open(tmp_path / "artifacts/pretokenize/train.safetensors")
    assert made.vocab_size == TokenFile.open(built / "artifacts/pretokenize/train.safetensors").vocab_size
