"""Conversations through the stages: what is trained on, what ends an answer, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mlxflow.data.token_file import TokenFile
from mlxflow.evaluation.text_generation import Sampling, Writer
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow

CHATS = Path(__file__).with_name("chats")
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def _run(folder: Path, stage: str = "pretokenize") -> dict[str, Any]:
    workflow = load_workflow(folder / "workflow.toml")
    return read_report(execute_stage(workflow, workflow.find(stage)) / "report.toml")


def _rows(folder: Path, side: str = "train") -> Iterator[tuple[list[str], list[int]]]:
    """Yield the tokens of each document, one a row, and which of them are trained on."""
    opened = TokenFile.open(folder / f"artifacts/pretokenize/{side}.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "artifacts/pretokenize/tokenizer.json"))
    for tokens, marks in zip(np.asarray(opened.rows.tokens), np.asarray(opened.rows.marks), strict=True):
        real = marks > 0
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens[real].tolist()]
        yield texts, (marks[real] & 1).tolist()


def _learnt(folder: Path) -> list[str]:
    """Return what is trained on of each training document, parts that do not touch parted by a bar."""
    found = []
    for texts, marks in _rows(folder):
        parts = "".join(text if mark else "\0" for text, mark in zip(texts, marks, strict=True)).split("\0")
        found.append(" | ".join(part for part in parts if part))
    return found


def _text(folder: Path, row: int = 0) -> str:
    return "".join(list(_rows(folder))[row][0])


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the folder in `chats/` that the test's parameter names, pretokenized."""
    folder = Path(shutil.copytree(CHATS / request.param, tmp_path / "case"))
    _run(folder)
    return folder


def _case(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [name], indirect=True)


@_case("02-inject")
def test_control_tokens_in_a_message_are_text_to_the_model(case: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case / "artifacts/pretokenize")
    opened = TokenFile.open(case / "artifacts/pretokenize/train.safetensors")
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def plain(text: str) -> list[int]:
        return list(tokenizer.encode(text, split_special_tokens=True))

    for number, row in enumerate(opened.documents()):
        place = opened.place(number)[1]
        messages = json.loads((case / "chats.jsonl").read_text().splitlines()[place - 1])["messages"]
        turns = [[begin, *plain(f"{m['role']}\n{m['content']}"), end, *plain("\n")] for m in messages]
        assert "<|im_end|>" in messages[0]["content"]
        assert row.tolist() == [token for turn in turns for token in turn]
    assert all(learnt.startswith("It ends a turn ") for learnt in _learnt(case))


@_case("02-inject")
def test_conversations_with_control_tokens_are_counted_and_reported(case: Path, capfd: Any) -> None:
    assert read_report(case / "artifacts/pretokenize/report.toml")["conversations_with_control_tokens"] == 6
    shutil.rmtree(case / "artifacts")
    _run(case)
    line = "pretokenize: 6 conversations contain control tokens inside their messages; these are encoded as plain text"
    assert line in capfd.readouterr().err.splitlines()


@_case("02-inject")
def test_control_tokens_in_a_document_are_text(case: Path) -> None:
    shutil.rmtree(case / "artifacts")
    settings = (case / "workflow.toml").read_text()
    (case / "workflow.toml").write_text(settings.replace('["chats.jsonl"]', '["plain.txt", "chats.jsonl"]'))
    _run(case)
    documents = [tokens for tokens, _ in _rows(case) if "The token" in "".join(tokens)]
    assert documents
    assert not any("<|im_end|>" in tokens for tokens in documents)


@_case("03a-template-end-overreach")
def test_a_turn_ends_with_the_end_token_of_its_template(case: Path) -> None:
    for learnt in _learnt(case):
        number = learnt[1]
        assert learnt == f"a{number}<|stop|>\n | b{number}<|stop|>\n"
    assert _text(case).endswith("<|stop|>\n<|endoftext|>")


@_case("03b-template-tool-answer")
def test_tool_results_inside_a_turn_are_not_trained_on(case: Path) -> None:
    for learnt in _learnt(case):
        minute = learnt[-10:].removesuffix(".<|stop|>")
        assert learnt.startswith("<|call|>clock | <|stop|> | It is 17:0")
        assert minute not in learnt.partition("It is")[0]


@_case("04-openai-fields")
def test_a_turn_with_weight_0_is_not_trained_on(case: Path) -> None:
    assert sorted(_learnt(case))[0] in ("right0<|im_end|>\n", "right1<|im_end|>\n")
    assert all("wrong" not in learnt for learnt in _learnt(case))
    assert all("wrong" in _text(case, row) for row in range(len(_learnt(case))))


@_case("05-chatml-drops-tool-calls")
def test_chatml_writes_tools_and_their_calls(case: Path) -> None:
    shutil.rmtree(case / "artifacts")
    settings = (case / "workflow.toml").read_text()
    (case / "workflow.toml").write_text(settings.replace("context_length = 63", "context_length = 511"))
    _run(case)
    for row, learnt in enumerate(_learnt(case)):
        call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        assert learnt.startswith(f"{call} | It is 17:0")
        assert '<tools>\n{"type": "function", "function": {"name": "clock", ' in _text(case, row)
        assert "<|im_start|>tool\n17:0" in _text(case, row)


@_case("06b-string-arguments")
def test_arguments_that_are_json_text_are_decoded(case: Path) -> None:
    for learnt in _learnt(case):
        number = learnt.partition('"a": ')[2][0]
        assert learnt == f'<|call|>add {{"a": {number}}}<|call|>say {{"text": "x"}}<|stop|> | {number}<|stop|>'


# --- ends


def _frogs(folder: Path, settings: str = "") -> None:
    """Write conversations in which the length of the answer is in the question."""
    animals = ("frog", "bird", "goat", "fish")
    records = []
    for i in range(160):
        count, animal = i % 5 + 1, animals[i % 4]
        answer = " ".join([*[animal] * count, "done"])
        messages = [{"role": "user", "content": f"{count} {animal}?"}, {"role": "assistant", "content": answer}]
        records.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chats.jsonl").write_text("".join(records))
    (folder / "workflow.toml").write_text(
        f"""
[pretokenize]
sources = ["chats.jsonl"]
context_length = 48
deduplicate = false
tokenizer = {{ vocab_size = 330 }}
{settings}
[train]
num_steps = 120
batch_size = 8
dynamic_batch_size = false
eval_every = 60
learning_rate = 0.01
[train.model]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
intermediate_size = 64
"""
    )


def test_a_model_ends_its_answers_with_the_token_that_it_learned_to_end_with(tmp_path: Path) -> None:
    _frogs(tmp_path)
    assert _run(tmp_path)["end_tokens"] == ["<|im_end|>"]
    _run(tmp_path, "train")
    folder = tmp_path / "artifacts/train"
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        assert end in json.loads((folder / name).read_text())["eos_token_id"], name
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"  # noqa: S105

    prompt = PROMPT.format("4 bird?")
    writer = Writer(folder)
    ids = writer.chat_ids([{"role": "user", "content": "4 bird?"}])
    assert ids == writer.text_ids(prompt)
    ours = "".join(writer.write(ids, Sampling(40, 0.0, 0)))
    assert ours == "bird bird bird bird done"

    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder))[:2]
    assert end in tokenizer.eos_token_ids
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=40) == ours

    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    opened = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "4 bird?"}]
    ids = opened.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = theirs.generate(**ids, max_new_tokens=40, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert opened.decode(written) == f"{ours}<|im_end|>"


ENDLESS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{# <|user|> <|assistant|> #}"
)


def test_a_missing_end_token_is_appended_to_a_turn(tmp_path: Path, capfd: Any) -> None:
    _frogs(tmp_path, 'chat_template = "t.jinja"\npacking = "none"')
    (tmp_path / "t.jinja").write_text(ENDLESS)
    report = _run(tmp_path)
    assert report["end_tokens"] == ["<|endoftext|>"]
    assert report["added_ends"] == 160
    assert (
        "pretokenize: the chat template ends no turn with a control token: an end-of-text token was appended to 160 "
        "conversations and is trained on, so that answers end"
    ) in capfd.readouterr().err.splitlines()
    assert all(learnt.endswith("done<|endoftext|>") for learnt in _learnt(tmp_path))


def test_the_tokenizers_end_token_is_that_of_a_custom_template(tmp_path: Path) -> None:
    _frogs(tmp_path, 'chat_template = "t.jinja"')
    shutil.copy(CHATS / "03a-template-end-overreach/t.jinja", tmp_path)
    assert _run(tmp_path)["end_tokens"] == ["<|stop|>"]
    config = json.loads((tmp_path / "artifacts/pretokenize/tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|stop|>"  # noqa: S105


# --- which turns


def test_only_the_last_turn_is_trained_on_if_configured(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHATS / "03a-template-end-overreach", tmp_path / "case"))
    settings = (folder / "workflow.toml").read_text()
    (folder / "workflow.toml").write_text(f'{settings}train_on = "last"\n'.replace("tokenizer", "#tokenizer"))
    _run(folder)
    assert {learnt[0] for learnt in _learnt(folder)} == {"b"}


def test_all_tokens_are_trained_on_except_turns_with_weight_0(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHATS / "04-openai-fields", tmp_path / "case"))
    settings = (folder / "workflow.toml").read_text()
    (folder / "workflow.toml").write_text(f'{settings}\ntrain_on = "all"\n')
    _run(folder)
    for learnt in _learnt(folder):
        assert "wrong" not in learnt
        assert "right" in learnt
        assert "user" in learnt
