"""Tasks of lm-eval run offline on local data, with the numbers of mlx-lm's own adapter.

Each case runs in a process of its own: lm-eval and what it imports warn about themselves, and take seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxflow.evaluation.accuracy import accuracy_of
from mlxflow.evaluation.item_tokens import ItemEncoder
from mlxflow.evaluation.own_tasks import ScoringRule, TaskNames, encode_task, evaluate_task
from mlxflow.evaluation.task_file import TaskFile, TaskItem
from mlxflow.evaluation.text_generation import Writer
from tests.evaluation.test_text_generation import TEMPLATE, TEXTS
from tests.small_models import write_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.journey

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl, train: words.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: words.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "note"
generation_kwargs: {until: ["zzz"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
WORDS: list[dict[str, Any]] = [
    {"question": f"what is {one}", "choices": ["a note?", "a line of text.", "small"], "answer": number % 3}
    for number, one in enumerate(("it?", "a note?", "a small model?", "text?", "why?"))
]

SCRIPT = """
import json, sys
from pathlib import Path
from mlxflow.evaluation import lm_eval_tasks
from mlxflow.evaluation.lm_eval_tasks import LmEvalRule
from mlxflow.messages.errors import MlxflowError
from mlxflow.models import model_folder
folder = Path("model")
model = model_folder.load(folder)[0]

def run(source, rule, positions, rows=0):
    try:
        task = lm_eval_tasks.open_task(source, Path(source), key=f'tasks[0].source = "{source}"')
        found = lm_eval_tasks.evaluate_lm_eval(
            task, model, folder, LmEvalRule(*rule), positions=positions, num_rows=rows, batch_size=2, name="train"
        )
    except MlxflowError as error:
        return str(error)
    items = [(one.item, one.score, one.nats, one.text) for one in found.items]
    return [items, found.metrics, found.num_truncated, found.uses_chat]

print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""

OWN = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM

def run(source, fewshot, chat, max_tokens):
    results = lm_eval.simple_evaluate(
        model=MLXLM("model", max_tokens=max_tokens, use_chat_template=chat), tasks=[source], num_fewshot=fewshot,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=1, apply_chat_template=chat,
    )
    name = source.removesuffix(".yaml")
    samples = results["samples"][name]
    scores = [one.get("acc", one.get("exact_match")) for one in samples]
    table = {key: value for key, value in results["results"][name].items() if isinstance(value, float)}
    return [scores, [one["filtered_resps"] for one in samples], table]

print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two tasks and their data."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").mkdir()
    special = ["<|im_start|>", "<|im_end|>"]
    write_llama(folder / "model", TEXTS, special=special, template=TEMPLATE, context_length=64)
    (folder / "words.yaml").write_text(TASK)
    (folder / "written.yaml").write_text(WRITTEN)
    (folder / "words.jsonl").write_text("".join(json.dumps(one) + "\n" for one in WORDS))
    return folder


def _run(place: Path, script: str, cases: list[Any]) -> list[Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    command = [sys.executable, "-c", script, json.dumps(cases)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_local_tasks_run_offline_with_the_numbers_of_mlx_lms_adapter(place: Path) -> None:
    chats = (False, True)
    cases = [("words.yaml", (1, 0, "", chat, True), 64) for chat in chats]
    *choices, written = _run(place, SCRIPT, [*cases, ("written.yaml", (None, 0, "", False, True), 64)])
    *own_choices, own_written = _run(
        place, OWN, [*(("words.yaml", 1, chat, 64) for chat in chats), ("written.yaml", None, False, None)]
    )
    for chat, (items, metrics, truncated, uses_chat), (scores, responses, table) in zip(
        chats, choices, own_choices, strict=True
    ):
        assert [one[0] for one in items] == [f"words:{number}" for number in range(5)]
        assert [one[1] for one in items] == scores
        for one, other in zip(items, responses, strict=True):
            assert one[2] == pytest.approx([nats for nats, _ in other], rel=1e-5)
        assert metrics == pytest.approx({name: table[f"{name},none"] for name in ("acc", "acc_norm")})
        assert (truncated, uses_chat) == (0, chat)
    items, metrics, *_ = written
    scores, responses, _ = own_written
    assert [[one[3]] for one in items] == responses
    assert any(one[3] for one in items)
    assert [one[1] for one in items] == scores
    assert metrics == {"exact_match": sum(scores) / 5}


def test_items_of_ones_own_get_the_numbers_of_lm_eval(place: Path) -> None:
    ((scores, responses, table),) = _run(place, OWN, [("words.yaml", 0, False, 64)])
    file = TaskFile(
        "choice",
        [
            TaskItem(line, one["question"], (), tuple(f" {text}" for text in one["choices"]), one["answer"])
            for line, one in enumerate(WORDS, 1)
        ],
        [],
    )
    rule = ScoringRule("never", 0, False, 4, (), "", False, True)
    names = TaskNames("words.jsonl", "train", "evaluate.tasks[0]")
    encoder = ItemEncoder(place / "model")
    task = encode_task(file, place / "model", rule, positions=64, names=names, encoder=encoder)
    encoder.close()
    writer = Writer(place / "model")
    for batch_size in (1, 4):
        found = evaluate_task(task, writer, writer.model, rule, batch_size=batch_size, names=names)
        assert [item.score for item in found.items] == scores
        for item, other in zip(found.items, responses, strict=True):
            assert item.nats == pytest.approx([nats for nats, _ in other], rel=1e-5)
    assert found.metrics == {"accuracy_by_sum": table["acc,none"], "accuracy_per_character": table["acc_norm,none"]}
    assert accuracy_of(scores).standard_error == pytest.approx(table["acc_stderr,none"])


def test_what_cannot_be_run_is_one_line(place: Path) -> None:
    (place / "lost.yaml").write_text(TASK.replace("words.jsonl", "lost.jsonl").replace("words", "lost"))
    rule = (None, 0, "", False, True)
    metric, long, data, first = _run(
        place,
        SCRIPT,
        [
            ("words.yaml", (None, 0, "f1", False, True), 64),
            ("words.yaml", (None, 0, "", False, False), 6),
            ("lost.yaml", rule, 64),
            ("words.yaml", (None, 2, "acc_norm", False, True), 64),
        ],
    )
    assert metric == 'tasks[0].source = "words.yaml": has no metric f1. Set its metric to one of: acc, acc_norm.'
    assert long == (
        'tasks[0].source = "words.yaml": 14 prompts do not fit into the 6 positions of train. '
        "Lower num_fewshot, or let prompts be truncated."
    )
    assert data.startswith('tasks[0].source = "lost.yaml": its data cannot be opened (Unable to find')
    assert data.endswith("HF_HUB_OFFLINE is set: put the data into the hub's cache, or name a local file of it.")
    assert len(first[0]) == 2


@pytest.mark.parametrize("source", ["words.yaml", "written.yaml"])
def test_an_id_without_a_row_of_the_embedding_is_one_line(place: Path, source: str) -> None:
    (line,) = _run(place, SCRIPT, [(source, (None, 0, "", False, True), 64, 20)])
    assert line.startswith(f'tasks[0].source = "{source}", train: the prompt has the id ')
    assert line.endswith(", the embedding of the model has 20 rows. Use the tokenizer of the model, or another prompt.")
