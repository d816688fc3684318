"""A real pretrained chat model taken through the whole workflow, beside what transformers and mlx-lm make of it.

SmolLM2-135M-Instruct learns twelve facts that it cannot know, in four ways: all weights, LoRA, DoRA, and LoRA beside
its 4-bit form. Not part of a plain `pytest`: run `pytest -m journey -n 0`, with the `journey` extra installed. The four
trainings take most of the time.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import TokenFile
from mlxflow.storage.report_files import read_report
from tests.cli.test_serve import serving
from tests.conftest import doit, mlxflow
from tests.journey import facts, pretrained

pytestmark = pytest.mark.journey

VARIANTS = ("lora", "dora", "full", "qlora")
NUM_STEPS = 20

WORKFLOW = """
[workflow]
name = "journey"

[pretokenize]
sources = ["chats.jsonl"]
holdout = 0.05
context_length = 80
packing = "none"
tokenizer = { from = "base" }
"""

TRAIN = """
[[train]]
name = "%s"
method = "%s"
model = { from = "%s" }
num_steps = %d
batch_size = 8
max_batch_size = 8
learning_rate = %s
warmup_steps = 2
eval_every = 8
log_every = 1
weight_decay = 0.0
max_grad_norm = 0
betas = [0.9, 0.999]
lora = { scale = 2.0 }
"""

REST = """
[[quantize]]
name = "q4"
model = "base"
data = "pretokenize"
bits = 4
max_validation_rows = 8

[[quantize]]
name = "q8"
model = "base"
data = "pretokenize"
bits = 8
max_validation_rows = 8

[profile]
input = "train:lora"
num_steps = 2
batch_size = 4

[benchmark]
input = "train:lora"
models = ["train:lora", "quantize:q4"]
batch_sizes = [4]
num_steps = 1
convergence_steps = 1
prompt_lengths = [16]
max_validation_rows = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the chats, the base model and its 4-bit form; data, training and quantizing are done."""
    try:
        base = pretrained.model_folder()
    except pretrained.UnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("journey")
    (folder / "base").symlink_to(base)
    _run("mlx_lm", "convert", "--hf-path", "base", "--mlx-path", "base-q4", "-q", "--q-bits", "4", folder=folder)
    facts.write_conversations(folder / "chats.jsonl")
    rates = {"lora": "1e-3", "dora": "1e-3", "full": "1e-4", "qlora": "1e-3"}
    tables = [
        TRAIN
        % (name, "lora" if name == "qlora" else name, "base-q4" if name == "qlora" else "base", NUM_STEPS, rates[name])
        for name in VARIANTS
    ]
    (folder / "workflow.toml").write_text(WORKFLOW + "".join(tables) + REST)
    (folder / "dodo.py").write_text((Path(__file__).parents[2] / "dodo.py").read_text())
    done = doit(folder, "pretokenize", "train", "quantize")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _run(*arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _load(folder: Path, variant: str) -> tuple[nn.Module, Any]:
    """Open a trained variant as mlx-lm's own command line does, with the adapters that lie beside quantized weights."""
    from mlx_lm import load

    path = folder / "artifacts" / "train" / variant
    adapters = str(path) if (path / "adapter_config.json").is_file() else None
    model, tokenizer, *_ = load(str(path), adapter_path=adapters)
    return model, tokenizer


def _answer(model: nn.Module, tokenizer: Any, question: str) -> tuple[str, str]:
    """Return mlx-lm's greedy answer and why it ended."""
    from mlx_lm import stream_generate

    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    parts = list(stream_generate(model, tokenizer, prompt, max_tokens=40))
    return "".join(part.text for part in parts), str(parts[-1].finish_reason)


# --- data


def test_conversation_masks_match_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    # the marks enclose the line break after the end token, as in TRL's training templates of this shape
    marked = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    expected = []
    for messages in facts.conversations():
        plain = tokenizer.apply_chat_template(messages, tokenize=False)
        made = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        assert tokenizer.decode(made["input_ids"]) == plain
        expected.append((tuple(made["input_ids"]), tuple(made["assistant_masks"])))
    found = []
    for name in ("train", "validation"):
        rows = TokenFile.open(folder / "artifacts" / "pretokenize" / f"{name}.safetensors").rows
        for tokens, marks in zip(rows.tokens, rows.marks, strict=True):
            used = int(np.count_nonzero(marks))
            found.append((tuple(map(int, tokens[:used])), tuple(int(mark) & 1 for mark in marks[:used])))
    assert sorted(found) == sorted(expected)


# --- training


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_of_twelve_facts_are_answered_in_unseen_wording_and_every_answer_ends(folder: Path, variant: str) -> None:
    model, tokenizer = _load(folder, variant)
    answers = [(*_answer(model, tokenizer, question), fact) for question, fact in facts.questions()]
    assert {ending for _, ending, _ in answers} == {"stop"}, answers
    assert sum(fact.key in answer for answer, _, fact in answers) >= 10, answers


def test_the_base_knows_none_of_the_facts(folder: Path) -> None:
    from mlx_lm import load

    model, tokenizer, *_ = load(str(folder / "base"))
    assert not [fact for question, fact in facts.questions() if fact.key in _answer(model, tokenizer, question)[0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_writes_what_mlx_lm_writes(folder: Path, variant: str) -> None:
    model, tokenizer = _load(folder, variant)
    question, _ = facts.questions()[0]
    artifact = f"artifacts/train/{variant}"
    done = mlxflow(folder, "generate", artifact, "--prompt", question, "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == _answer(model, tokenizer, question)[0]


def _validation_loss(model: nn.Module, file: TokenFile) -> float:
    """Return the mean loss in nats per learned token, row by row, in float64 from the model's own logits."""
    total, count = 0.0, 0
    for tokens, marks in zip(file.rows.tokens, file.rows.marks, strict=True):
        used = int(np.count_nonzero(marks))
        ids = mx.array(np.asarray(tokens[:used], np.int32))[None]
        logits = np.array(model(ids[:, :-1])[0].astype(mx.float32), np.float64)
        peak = logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[:, 0]
        picked = np.take_along_axis(logits, np.array(ids)[0, 1:, None], axis=-1)[:, 0]
        learned = (np.asarray(marks[1:used]) & 1).astype(bool)
        total += float((log_sum - picked)[learned].sum())
        count += int(learned.sum())
    return total / count


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reported_validation_loss_is_that_of_the_files(folder: Path, variant: str) -> None:
    model, _ = _load(folder, variant)
    report = read_report(folder / "artifacts" / "train" / variant / "report.toml")
    file = TokenFile.open(folder / "artifacts" / "pretokenize" / "validation.safetensors")
    assert math.log(report["last_validation_perplexity"]) == pytest.approx(_validation_loss(model, file), abs=1e-4)


def test_a_fused_adapter_is_what_mlx_lm_fuses(folder: Path) -> None:
    adapters = "artifacts/train/lora/adapters"
    _run("mlx_lm", "fuse", "--model", "base", "--adapter-path", adapters, "--save-path", "fused", folder=folder)
    files = (folder / "artifacts" / "train" / "lora", folder / "fused", folder / "base")
    ours, theirs, base = (mx.load(str(one / "model.safetensors")) for one in files)
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert isinstance(base, dict)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        # a product of 8 terms, scaled and added once: ten roundings at the size of the weight
        own, peer = np.array(value), np.array(theirs[name])
        bound = 10 * np.finfo(np.float32).eps * np.abs(own).max()
        if peer.dtype == np.float16:  # mlx-lm adds in the dtype of the base: what is added and the sum are rounded
            added = np.abs(own - np.array(base[name]))
            bound = (
                bound + np.finfo(np.float16).eps / 2 * (np.abs(peer) + added) + np.finfo(np.float16).smallest_subnormal
            )
        assert np.all(np.abs(own - peer) <= bound), name


def test_the_loss_falls_as_in_mlx_lms_own_training(folder: Path) -> None:
    """Rows, their order, rates and optimizer are the same; the adapters' random start is not."""
    ours = [
        record["loss"]
        for line in (folder / "artifacts" / "train" / "lora" / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "train"
    ]
    theirs = _losses_of_mlx_lm(folder)
    assert len(ours) == len(theirs) == NUM_STEPS
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)  # B of a new adapter is zero: both start at the base's loss
    # from the middle on, a mean over several batches: the random start is what differs
    half = NUM_STEPS // 2
    assert np.mean(ours[half:]) <= 1.25 * np.mean(theirs[half:]) + 0.02


def _losses_of_mlx_lm(folder: Path) -> list[float]:
    from mlx.optimizers import AdamW
    from mlx_lm import load
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlxflow.data.loader import Order
    from mlxflow.storage.run_context import derive_seed
    from mlxflow.training.optimizers import make_schedule

    settings = json.loads((folder / "artifacts" / "train" / "lora" / "adapters" / "adapter_config.json").read_text())
    model, *_ = load(str(folder / "base"))
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"])
    rows = TokenFile.open(folder / "artifacts" / "pretokenize" / "train.safetensors").rows

    def batches(**_: object) -> Iterator[tuple[mx.array, mx.array]]:
        order = Order(rows.num_rows, seed=derive_seed(0, "train.batches"))
        for step in range(NUM_STEPS):
            batch = rows.take(order.rows(8 * step, 8))
            learned = batch.marks & 1
            first = learned.argmax(axis=1)
            yield mx.array(batch.tokens), mx.array(np.stack([first, first + learned.sum(axis=1) - 1], axis=1))

    losses: list[float] = []

    class Kept(TrainingCallback):  # type: ignore[misc]  # mlx_lm has no types
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            losses.append(train_info["train_loss"])

    schedule = make_schedule(
        name="cosine", learning_rate=1e-3, final_learning_rate=0.0, num_steps=NUM_STEPS, warmup_steps=2, decay_steps=0
    )
    train(
        model,
        AdamW(learning_rate=schedule, weight_decay=0.0, bias_correction=True),
        CacheDataset([]),
        args=TrainingArgs(
            batch_size=8, iters=NUM_STEPS, steps_per_report=1, adapter_file=str(folder / "peer.safetensors")
        ),
        iterate_batches=batches,
        training_callback=Kept(),
    )
    return losses


# --- other stages and other programs


@pytest.mark.parametrize(("variant", "bits"), [("q4", 4), ("q8", 8)])
def test_quantized_weights_are_those_of_mlx_lm(folder: Path, variant: str, bits: int) -> None:
    peer = f"base-q{bits}"
    if not (folder / peer).exists():
        _run("mlx_lm", "convert", "--hf-path", "base", "--mlx-path", peer, "-q", "--q-bits", str(bits), folder=folder)
    ours = mx.load(str(folder / "artifacts" / "quantize" / variant / "model.safetensors"))
    theirs = mx.load(str(folder / peer / "model.safetensors"))
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_profile_benchmark_and_page_end_in_bounded_memory(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    begin = time.monotonic()
    done = doit(folder, "profile", "benchmark", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"profile, benchmark and report: {time.monotonic() - begin:.0f} s")
    highest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    # the dense model is 0.54 GB; training it by adapters at 4 rows takes under 4 GB
    assert max(before, highest) * unit < 6e9
    page = (folder / "artifacts" / "index.html").read_text()
    for fact in facts.FACTS:
        if fact.answer in page:
            break
    else:
        pytest.fail("the page's samples show no held-out conversation")


def test_an_openai_client_is_answered_whole_streamed_and_up_to_a_stop(folder: Path) -> None:
    from openai import OpenAI

    question, fact = facts.questions()[0]
    with serving(folder, "train:lora") as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked: Any = {"model": "any", "messages": [{"role": "user", "content": question}], "temperature": 0}
        answer = client.chat.completions.create(**asked, max_tokens=40).choices[0]
        assert fact.key in str(answer.message.content)
        assert answer.finish_reason == "stop"
        parts = [part.choices[0] for part in client.chat.completions.create(**asked, max_tokens=40, stream=True)]
        assert "".join(part.delta.content or "" for part in parts) == answer.message.content
        assert parts[-1].finish_reason == "stop"
        cut = client.chat.completions.create(**asked, max_tokens=40, stop=[fact.key]).choices[0]
        assert fact.key not in str(cut.message.content)
        assert cut.finish_reason == "stop"


def test_a_second_build_has_nothing_to_do(folder: Path) -> None:
    done = doit(folder, "list", "--status")
    assert done.returncode == 0
    stale = [line for line in done.stdout.splitlines() if line.startswith("R ")]
    assert not [line for line in stale if line.split()[1].partition(":")[0] in ("pretokenize", "train", "quantize")]
