"""A remembered graph never changes a decision: random workflows, random edits, with the memory and without it."""

import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlxflow.data import sources
from mlxflow.messages.errors import UserError
from mlxflow.models import tokenizer_files
from mlxflow.storage import state_files
from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.tasks.graph import load_nodes
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.outputs import observe_outputs
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import find_stale, observe_inputs, observe_settings
from tests.conftest import doit, rest_in_matrix

TREE = {
    "notes": ["a.txt", "b.txt", "deeper/c.md", ".hidden.txt"],
    "docs": ["one.txt", "two.txt", "three.md"],
    "hub": ["data.jsonl"],
    "base": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
    "tok": ["tokenizer.json", "special_tokens_map.json", "vocab.json", "additional_chat_templates/t.jinja"],
    ".": ["single.txt", "chat.jinja", "replay.jsonl", "baseline.toml"],
}
SOURCES = ("notes", "docs/*.txt", "docs", "notes/**/*.md", "single.txt", "$CORPUS", "builtin:python-stdlib", "hf:hub")


def _content(path: Path, number: int) -> bytes:
    if path.suffix != ".safetensors":
        return f"text {number}".encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + number.to_bytes(8, "little")


def _write(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_content(path, number))


def random_workflow(choose: random.Random) -> str:
    """Return a workflow file that reads from some of the files of the tree, in every way that there is."""
    sources = choose.sample(SOURCES, choose.randint(1, 3))
    lines = ["[pretokenize]", f"sources = {json.dumps(sources)}"]
    if choose.random() < 0.3:
        lines.append(f"validation_sources = {json.dumps(choose.sample(SOURCES, 1))}")
    if choose.random() < 0.3:
        lines.append('chat_template = "chat.jinja"')
    if choose.random() < 0.4:
        lines.append(f'tokenizer = {{ from = "{choose.choice(["tok", "base", "base/"])}" }}')
    for variant in choose.choice([[""], ["x", "y"]]):
        lines += [f"[[train]]\nname = {json.dumps(variant)}" if variant else "[train]"]
        lines += ['replay = "replay.jsonl"'] if choose.random() < 0.4 else []
        lines += [f"num_steps = {choose.randint(10, 20)}"]
        lines += ["[train.model]", 'from = "base"'] if choose.random() < 0.5 else []
        dense = f"train:{variant}" if variant else "train"
    for variant in choose.choice([[""], ["q4", "q8"]]):
        lines += [f"[[quantize]]\nname = {json.dumps(variant)}" if variant else "[quantize]"]
        lines += ['model = "base"\ndata = "pretokenize"' if choose.random() < 0.4 else f'input = "{dense}"']
    lines += [f'[profile]\ninput = "{dense}"', f'[benchmark]\ninput = "{dense}"\nmodels = ["{dense}"]']
    lines += ['baseline = "baseline.toml"'] if choose.random() < 0.5 else []
    return "\n".join([*lines, '[report]\nmodels = ["train:*"]', ""])


class Project:
    """A folder with a random workflow over random files, in which random edits are made.

    Runs are pretended: each stage's outputs are a function of its settings and the identities of its inputs.
    """

    cache = DigestCache(Path("/nowhere"))  # of all projects: the built-in corpus is read once

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.choose = random.Random(seed)
        self.records: dict[str, dict[str, Any]] = {}
        for parent, names in TREE.items():
            for name in names:
                _write(folder / parent / name, 0)
        self.workflow = folder / "workflow.toml"
        self.workflow.write_text(random_workflow(self.choose))

    def files(self) -> list[Path]:
        """Return every file that is nobody's artifact."""
        artifacts = self.folder / "artifacts"
        return sorted(p for p in self.folder.rglob("*") if p.is_file() and artifacts not in p.parents)

    def nodes(self, *, remembering: bool) -> list[Node] | str:
        """Return the stages, or what is wrong with the workflow."""
        state = self.folder / ("artifacts/.mlxflow" if remembering else "nowhere")
        try:
            return load_nodes(self.workflow, state)
        except UserError as error:
            return str(error)

    def decision(self, *, remembering: bool) -> object:
        """Return the stages and what a run would do, with the reasons; or what is wrong with the workflow."""
        nodes = self.nodes(remembering=remembering)
        if isinstance(nodes, str):
            return nodes
        planned = find_stale(nodes, lambda task: self.records.get(task, {}), self.cache)
        return nodes, [(one.node.task, one.reasons) for one in planned]

    def run(self) -> None:
        """Pretend to run what is stale, as the remembered graph has it."""
        nodes = self.nodes(remembering=True)
        if isinstance(nodes, str):
            return
        (self.folder / "artifacts/.mlxflow").mkdir(parents=True, exist_ok=True)
        stale = {one.node.task for one in find_stale(nodes, lambda task: self.records.get(task, {}), self.cache)}
        for node in (node for node in nodes if node.task in stale):
            try:
                inputs = observe_inputs(node, self.cache)
            except (OSError, ValueError):  # damaged: the real run ends here too
                return
            number = int(digest_json([node.settings, inputs]), 16) % 2**60
            for name in node.outputs:
                _write(self.folder / name, number)
            self.records[node.task] = {
                "settings": observe_settings(node),
                "inputs": inputs,
                "outputs": observe_outputs(node, self.cache),
            }

    def edit(self) -> str:
        """Make one random edit and return what it was."""
        kinds = [self._edit, self._edit, self._delete, self._add, self._rename, self._empty, self._point]
        return self.choose.choice(kinds)()

    def _edit(self) -> str:
        path = self.choose.choice(self.files())
        if path == self.workflow:
            path.write_text(random_workflow(self.choose))
        else:
            _write(path, self.choose.randint(1, 10**6))
        return f"edit {path}"

    def _delete(self) -> str:
        path = self.choose.choice([path for path in self.files() if path != self.workflow])
        path.unlink()
        return f"delete {path}"

    def _add(self) -> str:
        folder = self.choose.choice(["notes", "notes/new", "docs", "hub", "base", "tok"])
        name = self.choose.choice(
            ["n.txt", "n.md", "n.safetensors", "chat_template.jinja", "tokenizer_config.json", "n.py", "merges.txt"]
        )
        _write(self.folder / folder / name, self.choose.randint(1, 10**6))
        return f"add {folder}/{name}"

    def _rename(self) -> str:
        path = self.choose.choice([*(self.folder / name for name in TREE), *self.files()])
        if path in (self.folder, self.workflow) or not path.exists():
            return self._edit()
        away = self.choose.random() < 0.5
        path.rename(path.with_name(f"renamed-{path.name}") if away else path.with_name(f"{path.stem}-2{path.suffix}"))
        return f"rename {path}"

    def _empty(self) -> str:
        path = self.choose.choice([path for path in self.files() if path != self.workflow])
        path.write_bytes(b"")
        return f"empty {path}"

    def _point(self) -> str:
        os.environ["CORPUS"] = self.choose.choice(["docs", "notes", "nowhere"])
        return f"CORPUS = {os.environ['CORPUS']}"

    def undo(self) -> str:
        """Put every file of the tree back that is not there."""
        os.environ["CORPUS"] = "docs"
        for parent, names in TREE.items():
            for name in names:
                if not (self.folder / parent / name).is_file():
                    _write(self.folder / parent / name, 0)
        return "undo"


@pytest.fixture(autouse=True)
def _corpora_are_set(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set the variable, and a built-in corpus of few files: it is looked at for every decision."""
    library = tmp_path_factory.mktemp("library")
    for name in ("one.py", "package/two.py", "package/three.py"):
        _write(library / name, 0)
    monkeypatch.setattr(sources, "_library", lambda: str(library))
    monkeypatch.setenv("CORPUS", "docs")


@pytest.mark.parametrize("seed", rest_in_matrix(range(24), *range(6)))
def test_the_cached_graph_never_changes_which_stages_run(tmp_path: Path, seed: int) -> None:
    project = Project(tmp_path, seed)
    history: list[str] = []
    for _ in range(5):
        for _ in range(project.choose.randint(1, 5)):
            project.run()
            history.append("run")
            assert project.decision(remembering=True) == project.decision(remembering=False), history
        for _ in range(project.choose.randint(1, 2)):
            history.append(project.edit())
            assert project.decision(remembering=True) == project.decision(remembering=False), history
        if isinstance(project.nodes(remembering=False), str):
            history.append(project.undo())


@pytest.mark.parametrize("seed", range(8))
def test_resolving_makes_only_recorded_disk_queries(tmp_path: Path, seed: int) -> None:
    project = Project(tmp_path / "project", seed)
    asked = load_workflow(project.workflow)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.move(project.workflow, alone)
    shutil.rmtree(project.folder)
    answered = load_workflow(alone / "workflow.toml", Disk(alone, json.loads(json.dumps(asked.disk.lookups))))
    assert [one.inputs for one in answered.stages] == [one.inputs for one in asked.stages]


REMEMBERED = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 2
batch_size = 4
warmup_steps = 0
eval_every = 0
max_validation_rows = 8
replay = "replay.jsonl"
model = { from = "base" }
[[quantize]]
name = "q4"
model = "base"
[[quantize]]
name = "q8"
bits = 8
"""
FRESH = "-- pretokenize\n-- train\n-- quantize:q4\n-- quantize:q8\n"

#: What lies beside the base's configuration and weights.
BESIDE = ("generation_config.json", "vocab.json", "additional_chat_templates/tool_use.jinja")


def _set_rope_theta(job: Path) -> None:
    path = job / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500_000}))


def _flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


Q8 = "quantize:q8: because train runs"

LATER_EDITS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "the corpus": (
        lambda job: (job / "notes/03.txt").write_text("another note"),
        [
            "pretokenize: source notes/03.txt changed",
            "train: because pretokenize runs",
            "quantize:q8: because train runs; because pretokenize runs",
        ],
    ),
    "the base's config": (
        _set_rope_theta,
        ["train: source base/config.json changed", "quantize:q4: source base/config.json changed", Q8],
    ),
    "the base's weights": (
        lambda job: _flip_last_bit(job / "base/model.safetensors"),
        ["train: source base/model.safetensors changed", "quantize:q4: source base/model.safetensors changed", Q8],
    ),
    "the base's end tokens": (
        lambda job: (job / "base/generation_config.json").write_text('{"eos_token_id": [1, 2]}'),
        [
            "train: source base/generation_config.json changed",
            "quantize:q4: source base/generation_config.json changed",
            Q8,
        ],
    ),
    "a vocabulary of the base": (
        lambda job: (job / "base/vocab.json").write_text('{"a": 1}'),
        ["train: source base/vocab.json changed", "quantize:q4: source base/vocab.json changed", Q8],
    ),
    "a named template of the base that is gone": (
        lambda job: (job / "base/additional_chat_templates/tool_use.jinja").unlink(),
        [
            "train: source base/additional_chat_templates/tool_use.jinja is gone",
            "quantize:q4: source base/additional_chat_templates/tool_use.jinja is gone",
            Q8,
        ],
    ),
    "a template of the base that is new": (
        lambda job: (job / "base/chat_template.jinja").write_text("{{ messages }}"),
        ["train: source base/chat_template.jinja is new", "quantize:q4: source base/chat_template.jinja is new", Q8],
    ),
    "what decides nothing": (lambda job: (job / "base/README.md").write_text("a model"), []),
    "end tokens gone from an artifact": (
        lambda job: (job / "artifacts/train/generation_config.json").unlink(),
        ["train: artifacts/train/generation_config.json is missing", Q8],
    ),
    "a vocabulary gone from an artifact": (
        lambda job: (job / "artifacts/quantize/q4/vocab.json").unlink(),
        ["quantize:q4: artifacts/quantize/q4/vocab.json is missing"],
    ),
    "a template put into an artifact": (
        lambda job: (job / "artifacts/train/chat_template.jinja").write_text("{{ messages }}"),
        ["train: artifacts/train/chat_template.jinja was added after the run", Q8],
    ),
    "an index put into an artifact": (
        lambda job: (job / "artifacts/quantize/q8/model.safetensors.index.json").write_text("{}"),
        ["quantize:q8: artifacts/quantize/q8/model.safetensors.index.json was added after the run"],
    ),
    "a note put into an artifact": (lambda job: (job / "artifacts/train/README.md").write_text("a model"), []),
    "the run that is followed": (
        lambda job: (job / "replay.jsonl").write_text('{"step": 1, "batch_size": 4}\n'),
        ["train: source replay.jsonl changed", Q8],
    ),
}


def test_every_edit_of_an_input_is_seen_from_the_third_doit_on(job_copy: Path) -> None:
    shutil.move(job_copy / "artifacts/train", job_copy / "base")
    shutil.copy(job_copy / "base/metrics.jsonl", job_copy / "replay.jsonl")
    shutil.rmtree(job_copy / "artifacts")
    (job_copy / "base/additional_chat_templates").mkdir()
    for name in BESIDE:
        (job_copy / "base" / name).write_text("{}")
    (job_copy / "workflow.toml").write_text(REMEMBERED)
    assert doit(job_copy, "train", "quantize").returncode == 0
    for _ in range(3):
        assert doit(job_copy, "train", "quantize").stdout == FRESH
    base = sorted(
        f"base/{name}" for name in (*BESIDE, *tokenizer_files.TOKENIZER_FILES, "config.json", "model.safetensors")
    )
    lock = tomllib.loads((job_copy / "mlxflow.lock").read_text())
    made = [f"artifacts/pretokenize/{name}" for name in ("tokenizer.json", "tokenizer_config.json")]
    made += [f"artifacts/pretokenize/{side}.safetensors" for side in ("train", "validation")]
    assert list(lock["train"]["inputs"]) == [*made, *base, "replay.jsonl"]
    assert list(lock["quantize:q4"]["inputs"]) == base
    assert {f"artifacts/quantize/q4/{name}" for name in BESIDE} < lock["quantize:q4"]["outputs"].keys()
    assert "artifacts/train/generation_config.json" in lock["quantize:q8"]["inputs"]
    for name, (change, expected) in LATER_EDITS.items():
        kept = {path: path.read_bytes() for path in job_copy.rglob("*") if path.is_file() and path.suffix != ".log"}
        change(job_copy)
        added = {path for path in job_copy.rglob("*") if path.is_file()} - kept.keys()
        lines = doit(job_copy, "plan", "train", "quantize").stdout.splitlines()
        assert [line.partition("  (")[0] for line in lines[:-1]] == expected, name
        for path, data in kept.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
        for path in (path for path in added if path.suffix != ".log"):
            path.unlink()
    assert doit(job_copy, "train", "quantize").stdout == FRESH


# --- a remembered graph that is not what was written


class Remembered:
    """A workflow whose graph is remembered."""

    def __init__(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("a note")
        self.workflow, self.state = folder / "workflow.toml", folder / "artifacts/.mlxflow"
        self.workflow.write_text('[pretokenize]\nsources = ["notes.txt"]\n[train]\nnum_steps = 10\n')
        self.state.mkdir(parents=True)
        self.file = self.state / "graph.json"
        self.nodes = load_nodes(self.workflow, self.state)

    def assert_not_used(self, capsys: pytest.CaptureFixture[str], reason: str) -> None:
        """The graph is resolved and remembered again, and one line says why."""
        assert load_nodes(self.workflow, self.state) == self.nodes
        said = f"{self.file}: not valid state ({reason}). The workflow is resolved again.\n"
        assert capsys.readouterr() == ("", said)
        assert load_nodes(self.workflow, self.state) == self.nodes
        assert capsys.readouterr() == ("", "")


@pytest.fixture
def remembered(tmp_path: Path) -> Remembered:
    return Remembered(tmp_path)


def test_a_cached_graph_is_used(remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.tasks.graph._resolve", None)
    assert load_nodes(remembered.workflow, remembered.state) == remembered.nodes


@pytest.mark.parametrize("part", range(8))
def test_a_flipped_byte_of_the_cached_graph_is_detected(
    remembered: Remembered, capsys: pytest.CaptureFixture[str], part: int
) -> None:
    data = bytearray(remembered.file.read_bytes())
    data[60 + part * (len(data) - 61) // 7] ^= 1
    remembered.file.write_bytes(data)
    remembered.assert_not_used(capsys, "its bytes do not fit its checksum")


def _node(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda stored: stored["nodes"][1].update(fields)


EXPECTED = "expected stages, stamps and questions"
GRAPHS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "stages are null": (lambda stored: stored.update(nodes=None), EXPECTED),
    "no stamps": (lambda stored: stored.pop("code"), EXPECTED),
    "stamps are numbers": (lambda stored: stored.update(code=[[1, 2, 3, 4]]), EXPECTED),
    "questions are numbers": (lambda stored: stored.update(lookups=[1]), EXPECTED),
    "a question without arguments": (lambda stored: stored.update(lookups=[["is_file", [], True, None]]), EXPECTED),
    "a stage is a list": (lambda stored: stored.update(nodes=[[]]), "expected the fields of a stage"),
    "a stage with another field": (_node(more=1), "expected the fields of a stage"),
    "inputs are text": (_node(inputs="x"), "inputs of a stage is not valid"),
    "settings are null": (_node(settings=None), "settings of a stage is not valid"),
    "a setting is null": (_node(settings={"a": None}), "settings of a stage is not valid"),
    "a device that is a number": (_node(bound_device=1), "bound_device of a stage is not valid"),
    "a folder upwards": (_node(folder="../home"), "'train' writes outside of its artifact"),
    "a stage that is a folder": (
        _node(task="../../home", folder="artifacts/../../home", outputs=[]),
        "'../../home' writes outside of its artifact",
    ),
    "an output upwards": (_node(outputs=["artifacts/train/../../x"]), "'train' writes outside of its artifact"),
    "an output elsewhere": (_node(outputs=["/etc/x"]), "'train' writes outside of its artifact"),
    "a copy elsewhere": (_node(copies={"x": "artifacts/train/report.toml"}), "'train' writes outside of its artifact"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_forged_cached_graph_is_not_used(
    remembered: Remembered, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, reason = GRAPHS[case]
    stored = state_files.read(remembered.file)
    change(stored)
    remembered.file.write_bytes(state_files.encode(stored))
    remembered.assert_not_used(capsys, reason)


def test_a_node_with_every_field_set_survives_caching() -> None:
    node = Node(
        task="train:a",
        doc="doc",
        root=Path("root"),
        folder="artifacts/train/a",
        inputs=("in",),
        outputs=("artifacts/train/a/out",),
        settings={"seed": 1},
        command=("python",),
        corpora=("builtin:a",),
        beside=("artifacts/b",),
        spellings={"/home/a": "~"},
        bound_device="cpu",
        device="cpu",
        uses_device=False,
        threads=3,
        ranks="2 ranks (ring)",
        copies={"artifacts/out": "artifacts/train/a/out"},
        measured=("artifacts/train/a/out",),
    )
    unset = [field.name for field in fields(Node) if getattr(node, field.name) == field.default]
    assert unset == ["basis"]
    assert Node.from_json(json.loads(json.dumps(node.as_json()))) == node
