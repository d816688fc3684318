"""Products of numbers that are within their bounds alone are bounded when the workflow is read."""

from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.workflow.loader import load_workflow

SOURCES = 'sources = ["notes.txt"]\n'
LONG = f"[pretokenize]\n{SOURCES}context_length = 1048576\n"
BASE = '[train]\nmethod = "lora"\nmodel.from = "hub/model"\n'
QAT = '[quantize]\nmethod = "qat"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("some text")
    return tmp_path / "workflow.toml"


def mistakes(path: Path, text: str) -> list[str]:
    path.write_text(text if "[pretokenize]" in text else f"[pretokenize]\n{SOURCES}{text}")
    try:
        load_workflow(path)
    except WorkflowError as error:
        return [line.partition("workflow.toml: ")[2] for line in error.problems]
    return []


FORWARD = "at most 17,179,869,184 tokens in a forward pass"
PRODUCTS = {
    f"{LONG}[train]\nbatch_size = 16385": "train.batch_size = 16385: "
    f"expected, with pretokenize.context_length = 1048576, {FORWARD}, not 17,180,917,760. Lower one of them.",
    f"{LONG}[train]\nbatch_size = 2\ngrad_accum_steps = 1048576": "train.batch_size = 2: "
    "expected, with pretokenize.context_length = 1048576 and grad_accum_steps = 1048576, "
    "at most 1,099,511,627,776 tokens in an update, not 2,199,023,255,552. Lower one of them.",
    f"{LONG}[train]\nbatch_size = 16\ngrad_accum_steps = 600\nnum_steps = 1000000000": "train.batch_size = 16: "
    "expected, with pretokenize.context_length = 1048576, grad_accum_steps = 600 and num_steps = 1000000000, "
    "at most 10,000,000,000,000,000 tokens in all, not 10,066,329,600,000,000,000. Lower one of them.",
    f"{LONG}[train]\nbatch_size = 8192\nprefetch_batches = 64\nnum_steps = 4": "train.batch_size = 8192: "
    "expected, with pretokenize.context_length = 1048576 and prefetch_batches = 64, "
    "at most 137,438,953,472 tokens gathered ahead, not 549,755,813,888. Lower one of them.",
    "tokenizer.vocab_size = 1000000\n[train.model]\nhidden_size = 400000\ntie_word_embeddings = false\n"
    "intermediate_size = 8\nnum_layers = 1": "train.model.hidden_size = 400000: "
    "expected, with num_layers = 1 and pretokenize.tokenizer.vocab_size = 1000000, "
    "at most 1,000,000,000,000 weights, not 1,440,009,600,000. Lower one of the three.",
    f"{BASE}lora = {{ rank = 1048576, num_layers = 2049 }}": "train.lora.rank = 1048576: "
    "expected, with lora.num_layers = 2049, at most 2,147,483,648 ranks in all, not 2,148,532,224. Lower one of them.",
    f'{QAT}training = "lora"\nlora = {{ rank = 1048576, num_layers = 2049 }}': "quantize.lora.rank = 1048576: "
    "expected, with lora.num_layers = 2049, at most 2,147,483,648 ranks in all, not 2,148,532,224. Lower one of them.",
    f"{LONG}{QAT}batch_size = 16385": "quantize.batch_size = 16385: "
    f"expected, with pretokenize.context_length = 1048576, {FORWARD}, not 17,180,917,760. Lower one of them.",
    f"{LONG}[profile]\nbatch_size = 16385": "profile.batch_size = 16385: "
    f"expected, with pretokenize.context_length = 1048576, {FORWARD}, not 17,180,917,760. Lower one of them.",
    f"{LONG}[profile]\nnum_steps = 1000000000": "profile.num_steps = 1000000000: "
    "expected, with train.batch_size = 32 and pretokenize.context_length = 1048576, "
    "at most 10,000,000,000,000,000 tokens in all, not 33,554,432,000,000,000. Lower one of them.",
    f"{LONG}[benchmark]\nbatch_sizes = [8, 16385]": "benchmark.batch_sizes = [8, 16385]: "
    f"expected, with pretokenize.context_length = 1048576, {FORWARD}, not 17,180,917,760. Lower one of them.",
    f"{LONG}[benchmark]\nmax_seconds = inf\nnum_steps = 1000000000": "benchmark.num_steps = 1000000000: "
    "expected, with batch_sizes = [16, 32, 64] and pretokenize.context_length = 1048576, "
    "at most 10,000,000,000,000,000 tokens in all, not 67,108,864,000,000,000. Lower one of them.",
    f"{LONG}[benchmark]\nmax_seconds = 0\nconvergence_steps = 1000000000": "benchmark.convergence_steps = 1000000000: "
    "expected, with batch_sizes = [16, 32, 64] and pretokenize.context_length = 1048576, "
    "at most 10,000,000,000,000,000 tokens in all, not 67,108,864,000,000,000. Lower one of them.",
    f"[[train]]\nmatrix = {{ num_steps = {list(range(1, 51))} }}\n"
    '[quantize]\ninput = "train:num_steps1"\n[profile]\ninput = "train:num_steps1"\n'
    '[benchmark]\ninput = "train:num_steps1"\nmodels = ["train:*"]\n'
    "[report]\nnum_prompts = 20\nprompt_tokens = 1048576\n": "report.prompt_tokens = 1048576: "
    "expected, with 20 prompts of 51 models, at most 1,000,000,000 tokens read and written, not 1,069,596,480. "
    "Lower it, or name fewer prompts or models.",
}


@pytest.mark.parametrize("text", PRODUCTS)
def test_a_product_out_of_bounds_is_refused(path: Path, text: str) -> None:
    assert mistakes(path, text) == [PRODUCTS[text]]


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        f"{LONG}[train]\nbatch_size = 16384\nprefetch_batches = 4",
        f"{LONG}[train]\nbatch_size = 1\nmax_batch_size = 1048576\nmax_validation_rows = 1048576",
        f"{LONG}[benchmark]\nnum_steps = 1000000000\nbatch_sizes = [1]",
        f"{BASE}lora = {{ rank = 1024, num_layers = inf }}",
        f'{QAT}training = "lora"\nlora = {{ rank = 8, num_layers = 1048576 }}',
        "[train]\nnum_steps = 1000000000\nbatch_size = 4096",
        "tokenizer.vocab_size = 1000000\n[train.model]\nhidden_size = 16384\nintermediate_size = 53248\n"
        "num_layers = 126\nnum_heads = 128\nnum_kv_heads = 8",
        "[report]\nnum_prompts = 20\nmax_tokens = 2048",
    ],
)
def test_products_within_the_bounds_of_a_large_machine_are_accepted(path: Path, text: str) -> None:
    assert mistakes(path, text) == []
