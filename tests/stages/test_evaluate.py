"""The evaluate stage in a workflow: its figures, gates and cache, and what is refused before a model is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load

from mlxflow.evaluation import job
from mlxflow.evaluation.text_generation import Writer
from mlxflow.messages.errors import CallError, SourceError, StageError, WorkflowError
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import TINY, doit, mlxflow

HEAD = TINY.read_text().replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]', 1).partition("[profile]")[0]
CHOICES: list[dict[str, Any]] = [
    {"prompt": "line 4: the", "choices": [" 12th thing", " 99th thong"], "answer": 0},
    {"prompt": "line 6: the", "choices": [" dog", " 2th thing"], "answer": " 2th thing"},
    {"prompt": "thing to", "choices": [" remember", " forget"], "answer": 1},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "the 12th thing to", "completion": " remember"},
    {"prompt": "note 1 line 2: the 3th", "completion": " dog"},
]
ANSWERS: list[dict[str, Any]] = [
    {"prompt": "the 12th thing to", "answer": ["REMEMBER", "x"]},
    {"prompt": "note", "answer": "?"},
]


def _write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(f"{json.dumps(one)}\n" for one in records))


@pytest.fixture
def place(project: Path) -> Path:
    """The built project with three files of items and no evaluation."""
    for name, records in (("choices", CHOICES), ("completions", COMPLETIONS), ("answers", ANSWERS)):
        _write(project, f"{name}.jsonl", records)
    shutil.rmtree(project / "artifacts/evaluate", ignore_errors=True)
    shutil.rmtree(project / "artifacts/.mlxflow/scores", ignore_errors=True)
    return project


def _evaluated(folder: Path, table: str) -> dict[str, Any]:
    (folder / "evaluate.toml").write_text(f"{HEAD}[evaluate]\n{table}\n")
    workflow = load_workflow(folder / "evaluate.toml")
    return read_report(execute_stage(workflow, workflow.find("evaluate")) / "report.toml")


def _items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "artifacts/evaluate/items.jsonl").read_text().splitlines()]


THREE = """tasks = [
    "choices.jsonl", "completions.jsonl",
    { source = "answers.jsonl", ignore_case = true, max_tokens = 3, name = "short" },
]"""


def test_models_are_scored_on_three_kinds_of_items(place: Path) -> None:
    report = _evaluated(place, THREE)
    rows = {(one["task"], one["model"]): one for one in report["accuracies"]}
    models = ("train", "quantize:q4", "quantize:q8")
    assert list(rows) == [(task, model) for task in ("choices", "completions", "short") for model in models]
    row = rows["choices", "train"]
    assert (row["kind"], row["items"], row["accuracy"]) == ("choice", 3, pytest.approx(2 / 3))
    assert row["standard_error"] == pytest.approx(1 / 3)
    assert rows["completions", "train"]["accuracy"] == 0.5
    assert rows["short", "train"]["accuracy"] == 0.5
    assert [(one["task"], one["model"], one["reference"]) for one in report["differences"]] == [
        (task, model, "train") for task in ("choices", "completions", "short") for model in models[1:]
    ]
    assert all(one["low"] < one["difference"] < one["high"] for one in report["differences"])
    found = _items(place)
    assert len(found) == 3 * (3 + 2 + 2)
    assert [one["score"] for one in found[:3]] == [1.0, 1.0, 0.0]
    done = mlxflow(place, "show", "evaluate", "--workflow", "evaluate.toml")
    assert done.returncode == 0, done.stderr
    assert "| choices | train | choice | 0.6667 +- 0.33 | 3 | 0 |" in done.stdout
    assert "| short | quantize:q8 - train | +0 |" in done.stdout


@pytest.mark.matrix
def test_log_likelihoods_are_those_of_mlx_lm(place: Path) -> None:
    import mlx.core as mx
    import mlx.nn as nn

    _evaluated(place, 'models = ["train", "quantize:q4"]\ntasks = ["choices.jsonl"]\nbatch_size = 4')
    # the CPU computes a quantized model with scales in fp32, mlx-lm with those of the file, in bf16
    for name, rounding in (("train", 1e-5), ("quantize/q4", 2e-3)):
        model, tokenizer = load(str(place / "artifacts" / name))
        own = [one for one in _items(place) if one["model"] == name.replace("/", ":")]
        for item, record in zip(own, CHOICES, strict=True):
            for nats, choice in zip(item["nats"], record["choices"], strict=True):
                before, ids = tokenizer.encode(record["prompt"]), tokenizer.encode(record["prompt"] + choice)
                logs = nn.log_softmax(model(mx.array([ids[:-1]])).astype(mx.float32), axis=-1)[0]
                places = range(len(before) - 1, len(ids) - 1)
                expected = sum(float(logs[place, ids[place + 1]]) for place in places)
                assert nats == pytest.approx(expected, rel=rounding)


def test_only_what_is_new_is_computed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Noting(Writer):
        def __init__(self, folder: Path) -> None:
            loaded.append(folder.name)
            super().__init__(folder)

    monkeypatch.setattr(job, "Writer", Noting)

    def computed(table: str) -> tuple[list[str], int, int]:
        loaded.clear()
        run = _evaluated(place, table)["run"]
        return [*loaded], run["computed"], run["known"]

    one, two = 'models = ["train"]\n', 'models = ["train", "quantize:q4"]\n'
    assert computed(one + 'tasks = ["choices.jsonl"]') == (["train"], 1, 0)
    assert computed(two + 'tasks = ["choices.jsonl"]') == (["q4"], 1, 1)
    assert computed(two + 'tasks = ["completions.jsonl", "choices.jsonl"]') == (["train", "q4"], 2, 2)
    assert computed(two + 'tasks = ["choices.jsonl"]\nmax_accuracy_drop = 1\nconfidence = 0.5') == ([], 0, 2)
    _write(place, "choices.jsonl", CHOICES[:2])
    assert computed(two + 'tasks = ["choices.jsonl", "completions.jsonl"]') == (["train", "q4"], 2, 2)
    asked = 'tasks = [{ source = "choices.jsonl", length_normalized = true }]'
    assert computed(one + asked) == (["train"], 1, 0)


GATES = {
    'tasks = ["choices.jsonl"]\nmin_accuracy = 0.9\nmodels = ["train"]': "evaluate.min_accuracy = 0.9: "
    "train has 0.6667 +- 0.33 on choices. Improve the model, or lower the gate.",
    'tasks = [{ source = "choices.jsonl", min_accuracy = 0.9 }]\nmodels = ["train"]': "evaluate.min_accuracy = 0.9: "
    "train has 0.6667 +- 0.33 on choices. Improve the model, or lower the gate.",
}


@pytest.mark.parametrize("table", GATES)
def test_under_the_least_accuracy_nothing_is_published(place: Path, table: str) -> None:
    with pytest.raises(StageError) as caught:
        _evaluated(place, table)
    assert str(caught.value) == GATES[table]
    assert not (place / "artifacts/evaluate").exists()
    assert _evaluated(place, table.replace("0.9", "0.6"))["run"]["known"] == 1  # what was computed is kept


@pytest.mark.matrix
def test_a_large_drop_from_the_first_model_is_refused(place: Path) -> None:
    _write(place, "completions.jsonl", COMPLETIONS[:1] * 4)
    broken = place / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(place / "artifacts/train", broken, ignore=shutil.ignore_patterns("checkpoints"))
    _negate_head(broken)
    table = 'models = ["train", "broken"]\ntasks = ["completions.jsonl"]\nmax_accuracy_drop = 0.5'
    with pytest.raises(StageError) as caught:
        _evaluated(place, table)
    assert str(caught.value) == (
        "evaluate.max_accuracy_drop = 0.5: broken is 1 below train on completions (95% interval 0.02022 to 1). "
        "Improve the model, or raise the gate."
    )
    report = _evaluated(place, table.replace("0.5", "1.0"))
    (row,) = report["differences"]
    assert (row["difference"], row["worse"], row.get("better", 0)) == (-1.0, 4, 0)
    assert row["high"] < 0
    own = 'tasks = [{ source = "completions.jsonl", max_accuracy_drop = 0 }]'
    _evaluated(place, f'models = ["train", "broken"]\n{own}\nmax_accuracy_drop = 0.5')


def _negate_head(folder: Path) -> None:
    """Make the likeliest token the least likely."""
    import mlx.core as mx

    file = folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    mx.save_safetensors(str(file), weights | {"model.norm.weight": -weights["model.norm.weight"]}, {"format": "mlx"})


BAD = {
    "": 'workflow.toml: evaluate.tasks = []: expected at least one. Write tasks = ["questions.jsonl"].',
    'tasks = ["gone.jsonl"]': 'workflow.toml: evaluate.tasks[0].source = "gone.jsonl": names no file. '
    "Name one, relative to the workflow file.",
    'tasks = ["bad.jsonl"]': "bad.jsonl:2: answer = 2: expected an index from 0 to 1, or the text of a choice. "
    "Fix the line.",
    'tasks = ["empty.jsonl"]': "empty.jsonl: has no item. Write one JSON object on each line.",
    'tasks = [{ source = "talk.jsonl", chat = "never" }]': 'talk.jsonl:1: has messages, and chat = "never" leaves out '
    "the chat template. Remove the key.",
    'tasks = ["talk.jsonl", { source = "a/talk.jsonl" }]': 'workflow.toml: evaluate.tasks[1].name = "talk": is also '
    "the name of tasks[0]. Give each task a name of its own.",
    'tasks = [{ source = "talk.jsonl", metric = "acc" }]': 'workflow.toml: evaluate.tasks[0].metric = "acc": has no '
    "effect on a task of JSONL items. Remove the key.",
    'tasks = [{ source = "arc_easy", stop = ["x"] }]': 'workflow.toml: evaluate.tasks[0].stop = ["x"]: has no effect '
    "on a task of lm-eval. Remove the key.",
    'tasks = [{ source = "talk.jsonl", answer_pattern = "(" }]': "workflow.toml: evaluate.tasks[0].answer_pattern = "
    '"(": is no regular expression (missing ), unterminated subpattern at position 0). Fix it or remove the key.',
    'tasks = ["own.yaml"]': "own.yaml: is no table. Fix the file.",
    'tasks = ["code.yaml"]': 'workflow.toml: evaluate.tasks[0].source = "code.yaml": names Python code of its own, '
    "own.py. Read it, then set trust_remote_code = true in the stage's table to run it.",
    'tasks = ["data.yaml"]': 'workflow.toml: evaluate.tasks[0].source = "lost.jsonl": names no file. '
    "Name one, relative to the workflow file.",
    'tasks = ["talk.jsonl"]\nmodels = ["train"]\nmax_accuracy_drop = 0.1': "workflow.toml: evaluate.max_accuracy_drop "
    "= 0.1: compares models, and there is one. Name the model to compare with before it in models, or remove the key.",
    'tasks = ["talk.jsonl"]\nmodels = ["train", "quantize:q9"]': 'workflow.toml: evaluate.models = "quantize:q9": '
    "no stage before this one makes it. Known: train, quantize:q4, quantize:q8.",
    'tasks = ["talk.jsonl"]\nmodels = ["pretokenize"]': 'workflow.toml: evaluate.models = "pretokenize": '
    "makes no config.json. Known: train, quantize:q4, quantize:q8.",
}


@pytest.mark.parametrize("table", BAD)
def test_mistakes_are_found_before_anything_is_trained(job: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    monkeypatch.setattr(Disk, "has_package", lambda *_: True)
    monkeypatch.chdir(job)
    _write(job, "bad.jsonl", [CHOICES[0], {**CHOICES[0], "answer": 2}])
    _write(job, "talk.jsonl", [{"messages": [{"role": "user", "content": "x"}], "answer": "y"}])
    (job / "empty.jsonl").write_text("\n")
    (job / "own.yaml").write_text("- 1")
    (job / "own.py").write_text("")
    (job / "code.yaml").write_text("task: code\nprocess_docs: !function own.process")
    (job / "data.yaml").write_text("task: data\ndataset_kwargs: {data_files: lost.jsonl}")
    Path("workflow.toml").write_text(f"{HEAD}[evaluate]\n{table}\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == BAD[table]


@pytest.mark.matrix
def test_a_missing_lm_eval_is_reported_with_the_command(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "has_package", lambda *_: False)
    monkeypatch.chdir(job)
    Path("own.yaml").write_text("task: own")
    Path("workflow.toml").write_text(f'{HEAD}[evaluate]\ntasks = ["own.yaml"]\n')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == (
        "workflow.toml: evaluate.tasks[0].source = \"own.yaml\": needs lm_eval. Run: pip install 'mlxflow[lm_eval]'."
    )


@pytest.mark.matrix
def test_a_conversation_needs_a_template_before_a_model_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Writer:
        raise AssertionError(folder)

    monkeypatch.setattr(job, "Writer", refuse)
    _write(place, "talk.jsonl", [{"messages": [{"role": "user", "content": "x"}], "answer": "y"}])
    with pytest.raises(CallError) as caught:
        _evaluated(place, 'tasks = ["talk.jsonl"]')
    folder = place / "artifacts/train"
    assert str(caught.value) == (
        f"{folder}: has no chat template, and talk.jsonl has messages. Leave out train, or the task."
    )
    _write(place, "long.jsonl", [{"prompt": "x " * 40, "completion": " y"}])
    with pytest.raises(
        SourceError, match=r"^long\.jsonl:1: is [0-9]+ tokens too long for the 16 positions of train\. "
    ):
        _evaluated(place, 'tasks = ["long.jsonl"]\nlong_prompts = "refuse"')


@pytest.mark.matrix
def test_cut_prompts_are_counted(place: Path) -> None:
    _write(place, "long.jsonl", [{"prompt": "thing to " * 40 + "thing to", "completion": " remember"}, COMPLETIONS[0]])
    report = _evaluated(place, 'tasks = ["long.jsonl"]\nmodels = ["train"]')
    (row,) = report["accuracies"]
    assert row["truncated"] == 1
    first, second = _items(place)
    assert first["cut_tokens"] > 0
    assert "cut_tokens" not in second


@pytest.mark.matrix
def test_doit_reruns_it_when_its_items_change(job_copy: Path) -> None:
    text = (job_copy / "workflow.toml").read_text()
    (job_copy / "workflow.toml").write_text(
        f'{text}\n[evaluate]\ntasks = ["choices.jsonl"]\nmodels = ["quantize:q4"]\n'
    )
    _write(job_copy, "choices.jsonl", CHOICES)
    assert "evaluate" in doit(job_copy, "list").stdout
    plan = doit(job_copy, "plan", "evaluate").stdout
    assert "evaluate" in plan
    assert "profile" not in plan
    done = doit(job_copy, "evaluate")
    assert done.returncode == 0, done.stderr
    assert {line[:2] for line in doit(job_copy, "evaluate").stdout.splitlines()} == {"--"}
    _write(job_copy, "choices.jsonl", CHOICES[:2])
    assert "choices.jsonl" in doit(job_copy, "plan", "evaluate").stdout
    _write(job_copy, "choices.jsonl", [{"prompt": "x"}])
    refused = doit(job_copy, "plan", "evaluate")
    assert refused.returncode != 0
    assert 'choices.jsonl:1: expected "completion", "choices" with "answer", or "answer". Fix the line.' in (
        refused.stdout + refused.stderr
    )


def test_an_empty_workflow_evaluates_nothing(tmp_path: Path) -> None:
    (tmp_path / "workflow.toml").write_text("")
    assert "evaluate" not in {one.name for one in load_workflow(tmp_path / "workflow.toml").stages}


@pytest.mark.matrix
def test_a_workflow_of_folders_only_trains_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    _write(project, "choices.jsonl", CHOICES)
    Path("folders.toml").write_text('[evaluate]\nmodels = ["artifacts/train"]\ntasks = ["choices.jsonl"]\n')
    workflow = load_workflow(Path("folders.toml"))
    assert [one.task for one in workflow.stages] == ["evaluate"]
    folder = execute_stage(workflow, workflow.find("evaluate"), into=project / "elsewhere")
    assert read_report(folder / "report.toml")["accuracies"][0]["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.matrix
def test_models_that_are_asked_in_different_ways_are_warned_of(place: Path) -> None:
    talking = place / "talking"
    shutil.rmtree(talking, ignore_errors=True)
    shutil.copytree(place / "artifacts/train", talking, ignore=shutil.ignore_patterns("checkpoints"))
    (talking / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    report = _evaluated(place, 'models = ["train", "talking"]\ntasks = ["choices.jsonl"]')
    assert report["warnings"] == [
        "choices: talking is asked through its chat template, and train without one, which is part of their "
        'difference. Set chat = "never" for the task, or compare models of one kind.'
    ]
    assert [one["nats"] for one in _items(place)[:3]] == [one["nats"] for one in _items(place)[3:]]  # the same text
    never = 'models = ["train", "talking"]\ntasks = [{ source = "choices.jsonl", chat = "never" }]'
    assert "warnings" not in _evaluated(place, never)


@pytest.mark.matrix
def test_a_repetition_for_comparison_takes_nothing_from_the_cache(place: Path) -> None:
    table = 'models = ["train"]\ntasks = ["choices.jsonl"]'
    _evaluated(place, table)
    workflow = load_workflow(place / "evaluate.toml")
    folder = execute_stage(workflow, workflow.find("evaluate"), into=place / "again")
    assert read_report(folder / "report.toml")["run"]["computed"] == 1
    assert (folder / "items.jsonl").read_bytes() == (place / "artifacts/evaluate/items.jsonl").read_bytes()


@pytest.mark.matrix
def test_variants_share_what_is_known_and_a_gguf_file_is_a_model(place: Path) -> None:
    pytest.importorskip("gguf")
    text = f"""{HEAD}[export]
[[evaluate]]
name = "a"
models = ["train"]
tasks = ["choices.jsonl"]
[[evaluate]]
name = "b"
models = ["train", "artifacts/export/model.gguf"]
tasks = ["choices.jsonl"]
"""
    (place / "evaluate.toml").write_text(text.replace(', "artifacts/export/model.gguf"', ""))
    workflow = load_workflow(place / "evaluate.toml")
    for task in ("export", "evaluate:a"):
        execute_stage(workflow, workflow.find(task))
    (place / "evaluate.toml").write_text(text)
    workflow = load_workflow(place / "evaluate.toml")
    report = read_report(execute_stage(workflow, workflow.find("evaluate:b")) / "report.toml")
    assert (report["run"]["computed"], report["run"]["known"]) == (1, 1)
    assert [one["accuracy"] for one in report["accuracies"]] == pytest.approx([2 / 3, 2 / 3])
