"""Text to batches, beside what others do with the same text on the same machine.

    python benchmarks/data.py [tokenize] [change] [load] [pack]

The corpus is this Python's library with its tests, and for ten times of it the sources of all installed packages too:
natural text, each document once. Peers run in processes of their own, imports included, in turns with ours; figures
are medians of the rounds. Needs the extra `test`, and `torch` for one row of `load`.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package
from benchmarks.corpora import write_corpora, write_job
from benchmarks.data_loading import time_loading
from benchmarks.processes import run_script

ROUNDS = 3

OURS = """
import shutil
from pathlib import Path
if sys.argv[1] == "library":
    import mlxflow.data.encoder as encoder
    encoder.FastEncoder.__init__ = lambda *_: (_ for _ in ()).throw(ValueError("left out"))
shutil.rmtree("artifacts", ignore_errors=True)
from mlxflow.__main__ import main
assert main(["run", "pretokenize"]) == 0
"""

DATASETS = """
import tempfile
import datasets
from tokenizers import Tokenizer
datasets.disable_progress_bars()
tokenizer = Tokenizer.from_file(sys.argv[2])
def encode(batch):
    return {"input_ids": [one.ids for one in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}
if sys.argv[3] == "transformers":  # as the documentation of `datasets` shows it
    from transformers import PreTrainedTokenizerFast
    whole = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], eos_token="<|endoftext|>")
    def encode(batch):
        return whole(batch["text"])
with tempfile.TemporaryDirectory() as cache:
    data = datasets.load_dataset("json", data_files=sys.argv[1], cache_dir=cache, split="train")
    data = data.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    assert len(data[0]["input_ids"])
"""

MLX_LM = """
import json
from transformers import PreTrainedTokenizerFast
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
with open(sys.argv[1]) as file:
    data = [json.loads(line) for line in file]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], eos_token="<|endoftext|>")
cached = CacheDataset(TextDataset(data, tokenizer))
for index in range(len(cached)):
    cached[index]
"""


def tokenize(folder: Path) -> None:
    """Pretokenize JSONL to the finished artifact."""
    one, ten = write_corpora(folder)
    tokenizer = folder / "tokenizer"
    job, large = write_job(folder / "one", one, tokenizer), write_job(folder / "ten", ten, tokenizer)
    definition = str(tokenizer / "tokenizer.json")
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "mlxflow": lambda: run_script(OURS, "fast", cwd=job),
        "mlxflow, tokenizers alone": lambda: run_script(OURS, "library", cwd=job),
        "datasets.map, 2 processes": lambda: run_script(DATASETS, str(one), definition, "transformers"),
        "... with encode_batch_fast": lambda: run_script(DATASETS, str(one), definition, "tokenizers"),
        "mlx-lm, one encode a sample": lambda: run_script(MLX_LM, str(one), definition),
        "mlxflow, ten times": lambda: run_script(OURS, "fast", cwd=large),
    }
    peers = {
        "datasets.map, ten times": lambda: run_script(DATASETS, str(ten), definition, "transformers"),
        "mlx-lm, ten times": lambda: run_script(MLX_LM, str(ten), definition),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*runs, *peers)}
    for number in range(ROUNDS):
        for name, act in (runs | (peers if number == 0 else {})).items():  # minutes each, so once
            found[name].append(act())
    for name, rounds in found.items():
        seconds = statistics.median(one[0] for one in rounds)
        peak = statistics.median(one[1] for one in rounds)
        ours = found["mlxflow, ten times" if "ten times" in name else "mlxflow"]
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rounds, ours, strict=False))
        size = (ten if "ten times" in name else one).stat().st_size
        print(
            f"{name:30} {seconds:7.2f} s  {size / seconds / 1e6:6.1f} MB/s  {peak / 1e6:5.0f} MB  {ratio:6.1f} x ours"
        )


def change(folder: Path) -> None:
    """Change one file of a thousand, with either engine."""
    _, ten = write_corpora(folder)
    notes = folder / "notes"
    notes.mkdir()
    with ten.open() as file:
        for number, line in enumerate(file):  # a thousand files of about 300 KB
            with (notes / f"{number % 1000:04}.txt").open("a") as note:
                note.write(json.loads(line)["text"])
    job = write_job(folder / "job", notes, folder / "tokenizer")
    again = OURS.replace('shutil.rmtree("artifacts", ignore_errors=True)\n', "")
    for engine in ("fast", "library"):
        whole = run_script(OURS, engine, cwd=job)[0]
        changed = []
        for number in range(ROUNDS):
            (notes / "0500.txt").write_text(f"another text for {engine}, number {number}")
            changed.append(run_script(again, engine, cwd=job)[0])
            assert "tokenized_files = 1\n" in (job / "artifacts/pretokenize/report.toml").read_text()
        median = statistics.median(changed)
        print(f"1,000 files, engine {engine}: all {whole:.2f} s, one changed {median:.2f} s ({median / whole:.3f})")


def _mlx_lm_batches(lengths: list[int], context_length: int) -> tuple[float, float]:
    """Return the shares of real tokens and of tokens never seen with mlx-lm's batches of 32."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Documents:
        def __len__(self) -> int:
            return len(lengths)

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"text": lengths[index]}

        def process(self, record: dict[str, int]) -> tuple[list[int], int]:
            return [1] * record["text"], 0

    real = slots = 0
    with Path(os.devnull).open("w") as silent:
        out, sys.stdout = sys.stdout, silent
        try:
            for batch, spans in iterate_batches(CacheDataset(Documents()), 32, context_length, loop=False):
                slots += batch.size
                real += int(spans[:, 1].sum().item())
        finally:
            sys.stdout = out
    return real / slots, 1 - real / sum(lengths)


def pack(folder: Path) -> None:
    """Lay documents into rows."""
    from mlxflow.data.encoder import choose_encoder

    if not (folder / "tokenizer").exists():
        write_corpora(folder)
    encoder = choose_encoder((folder / "tokenizer/tokenizer.json").read_text(), threads=2)
    documents = [json.loads(line)["text"] for line in (folder / "one.jsonl").read_text().splitlines()]
    definitions = [part for text in documents for part in text.split("\n\n\n") if part.strip()]
    for kind, parts in (("files", documents), ("definitions", definitions)):
        lengths = (np.diff(encoder.encode(parts, special=False)[1]) + 1).tolist()
        for context_length in (512, 2048):
            _print_packing(kind, lengths, context_length)
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(int) + 1, 2049).tolist()
    for capacity in (513, 2049):
        _time_best_fit([min(length, capacity) for length in lengths], capacity)


def _print_packing(kind: str, lengths: list[int], context_length: int) -> None:
    """Print how many slots of the rows hold a token, ours and mlx-lm's, and how many documents concatenation cuts."""
    from mlxflow.data.bin_packing import best_fit, cut

    capacity = context_length + 1
    cut_lengths = [piece.end - piece.begin for i, n in enumerate(lengths) for piece in cut(i, n, capacity)]
    rows, count = best_fit(cut_lengths, capacity)
    assert sum(cut_lengths) == sum(lengths)
    assert np.bincount(rows, weights=cut_lengths).max() <= capacity
    theirs, lost = _mlx_lm_batches(lengths, context_length)
    ends = np.cumsum(lengths)
    fits = np.array(lengths) <= capacity
    split = fits & ((ends - np.array(lengths)) // capacity != (ends - 1) // capacity)
    print(
        f"{kind:11} {len(lengths):6} documents, rows of {context_length:4}: best fit "
        f"{sum(cut_lengths) / (count * capacity):.3%} real, none lost, none cut that fits; mlx-lm {theirs:.1%} "
        f"real, {lost:.1%} lost; concatenated {split.mean():.1%} of the documents cut"
    )


def _time_best_fit(lengths: list[int], capacity: int) -> None:
    from mlxflow.data.bin_packing import best_fit

    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        best_fit(lengths, capacity)
        seconds.append(time.perf_counter() - begin)
    print(f"a million documents into rows of {capacity}: {statistics.median(seconds):.2f} s")


PARTS: dict[str, Callable[[Path], None]] = {"tokenize": tokenize, "change": change, "load": time_loading, "pack": pack}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[name](Path(scratch))
