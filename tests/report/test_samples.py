"""Samples of a workflow of conversations: held-out questions, what the model answers, and what the data answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.report import samples
from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.report.samples import SampleRequest, write_samples
from mlxflow.report.stage_reports.report import SampleText
from mlxflow.storage import report_structs
from mlxflow.storage.run_context import Member, derive_seed
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.late_device import MESSAGE, LateDevice
from tests.report.pages import Seen

TRAINING = """
[train]
num_steps = 2
warmup_steps = 1
batch_size = 2
dynamic_batch_size = false
[train.model]
hidden_size = 16
num_layers = 1
num_heads = 1
num_kv_heads = 1
intermediate_size = 16
"""


def _conversation(number: int) -> dict[str, Any]:
    turns = [
        ("system", "Be short."),
        ("user", f"What is {number} and one?"),
        ("assistant", f"It is {number + 1}."),
        ("user", "Sure?"),
        ("assistant", "Quite."),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _completion(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number} and one?", "completion": f" It is {number + 1}."}


def _build(folder: Path, make: Any, settings: str = "") -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(make(number)) + "\n" for number in range(30)))
    (folder / "workflow.toml").write_text(
        '[pretokenize]\nsources = ["data.jsonl"]\ncontext_length = 96\nholdout = 0.3\n'
        f"tokenizer = {{ vocab_size = 320 }}\n{settings}\n{TRAINING}"
    )
    workflow = load_workflow(folder / "workflow.toml")
    for stage in ("pretokenize", "train"):
        execute_stage(workflow, workflow.find(stage))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("chats"), _conversation)


def _samples(folder: Path, model: Path | None = None, **config: Any) -> list[SampleText]:
    artifacts = folder / "artifacts"
    names = ("validation.safetensors", "tokenizer.json", "tokenizer_config.json")
    usual: dict[str, Any] = {
        "prompts": (),
        "num_prompts": 2,
        "prompt_tokens": 12,
        "max_tokens": 8,
        "temperature": "auto",
    }
    return write_samples(
        SampleRequest(**(usual | config), seed=derive_seed(0, "report.samples")),
        {"train": (model or artifacts / "train") / "model.safetensors"},
        reports={"train": artifacts / "train/report.toml"},
        validation=tuple(artifacts / "pretokenize" / name for name in names),
    )


def test_conversations_become_questions_with_both_answers(chats: Path) -> None:
    found = _samples(chats, num_prompts=3)
    assert len(found) == 3
    writer = Writer(chats / "artifacts/train")
    for one in found:
        number = next(number for number in range(30) if one.question == f"What is {number} and one?")
        assert one.answer == f"It is {number + 1}."
        ids = writer.chat_ids(_conversation(number)["messages"][:2])
        sampling = Sampling(8, 0.0, derive_seed(0, "report.samples"))
        assert one.text == "".join(writer.write(ids, sampling))
        assert one.prompt is None


def test_prompts_of_the_workflow_go_through_the_template(chats: Path) -> None:
    (one,) = _samples(chats, prompts=("Why?",))
    writer = Writer(chats / "artifacts/train")
    ids = writer.chat_ids([{"role": "user", "content": "Why?"}])
    assert one.question == "Why?"
    assert one.text == "".join(writer.write(ids, Sampling(8, 0.0, derive_seed(0, "report.samples"))))
    assert one.answer is None


def test_a_model_with_another_tokenizer_is_asked_through_its_own_template(chats: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(chats / "artifacts/train", tmp_path / "other"))
    tokenizer = other / "tokenizer.json"
    definition = json.loads(tokenizer.read_text())
    vocabulary = definition["model"]["vocab"]
    low, high = [text for text in vocabulary if text.isalpha()][:2]
    vocabulary[low], vocabulary[high] = vocabulary[high], vocabulary[low]
    tokenizer.write_text(json.dumps(definition))
    for one in _samples(chats, model=other):
        writer = Writer(other)
        ids = writer.chat_ids([{"role": "user", "content": one.question}])
        assert one.text == "".join(writer.write(ids, Sampling(8, 0.0, derive_seed(0, "report.samples"))))


def test_completions_become_questions(tmp_path: Path) -> None:
    folder = _build(tmp_path, _completion)
    for one in _samples(folder):
        number = next(number for number in range(30) if one.question == f"What is {number} and one?")
        assert one.answer == f"It is {number + 1}."


def test_with_loss_on_all_tokens_the_beginnings_of_documents_are_continued(tmp_path: Path) -> None:
    folder = _build(tmp_path, _conversation, 'train_on = "all"')
    for one in _samples(folder):
        assert None not in (one.prompt, one.text)
        assert (one.question, one.answer, one.error) == (None, None, None)


def test_the_page_shows_question_answer_and_reference_answer(chats: Path) -> None:
    (made,) = _samples(chats, num_prompts=1)
    found = [msgspec.structs.replace(made, text="It <is> wrong.")]
    members = [Member("train", chats / "artifacts/train", (), ())]
    page = render([read_run(chats, members, name="chats", samples=found)])
    assert f"train Question {made.question} Answer It <is> wrong. In the data {made.answer}" in Seen(page).text


def test_an_error_that_is_raised_late_belongs_to_the_model_that_caused_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = LateDevice(monkeypatch)

    def write(request: SampleRequest, folder: Path, prompts: object) -> list[object]:
        device.calls_left = int(folder.name == "large")
        return []

    monkeypatch.setattr(samples, "_written", write)
    monkeypatch.setattr(samples, "_choose_prompts", lambda *_: None)
    monkeypatch.setattr(samples, "model_key", lambda provenance: "key")
    monkeypatch.setattr(report_structs, "read_provenance", lambda *_, **__: None)
    models = {name: tmp_path / name / "model.safetensors" for name in ("large", "small")}
    request = SampleRequest((), 1, 8, 8, 0.0, 0)
    (failed,) = write_samples(request, models, reports=models, validation=())
    assert failed.model == "large"
    assert failed.error == MESSAGE
