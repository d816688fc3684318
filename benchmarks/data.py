"""Text to batches, beside what others do with the same text on the same machine.

    python benchmarks/data.py [tokenize] [change] [load] [pack]

The corpus is this Python's library with its tests, and for ten times of it the sources of all installed packages too:
natural text, each document once. Peers run in processes of their own, imports included, in turns with ours; figures
are medians of the rounds. Needs the extra `test`, and `torch` for one row of `load`.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 3
CORPUS_BYTES = 31_500_000


# --- the corpus


def texts() -> Iterator[str]:
    """Yield the text of every Python source on this machine's path, the library first, each once."""
    seen: set[int] = set()
    for root in [str(Path(os.__file__).parent), *sys.path]:
        for path in sorted(Path(root).rglob("*.py")) if Path(root).is_dir() else []:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError):
                continue
            if text.strip() and "\0" not in text and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def write_corpora(folder: Path) -> tuple[Path, Path]:
    """Write the corpus and ten times of it as JSONL, in a shuffled order, and a tokenizer of 8,192 words."""
    from mlxflow.data.tokenizer import train_tokenizer, trained_vocabulary
    from mlxflow.data.tokenizer_folder import save_vocabulary

    documents: list[str] = []
    size = 0
    for text in texts():
        documents.append(text)
        size += len(text.encode())
        if size > 10 * CORPUS_BYTES:
            break
    random.Random(0).shuffle(documents)
    one, ten = folder / "one.jsonl", folder / "ten.jsonl"
    written = 0
    with one.open("w") as small, ten.open("w") as large:
        for text in documents:
            line = json.dumps({"text": text}) + "\n"
            large.write(line)
            if written < CORPUS_BYTES:
                small.write(line)
            written += len(line)
    trained = train_tokenizer(documents[:1500], vocab_size=8192)
    (folder / "tokenizer").mkdir()
    save_vocabulary(
        trained_vocabulary(trained.to_str(), context_length=512, template=None),
        tokenizer_file=folder / "tokenizer/tokenizer.json",
        config_file=folder / "tokenizer/tokenizer_config.json",
    )
    print(f"corpus: {one.stat().st_size / 1e6:.1f} MB and {ten.stat().st_size / 1e6:.1f} MB of JSONL, natural text")
    return one, ten


# --- processes


# ru_maxrss of a new process begins at what its parent had (Linux), so the system is asked for the process's own peak.
PEAK = """
import resource
from pathlib import Path
status = Path("/proc/self/status")
if status.exists():
    peak = next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak)
"""


def run(script: str, *arguments: str, cwd: Path | None = None) -> tuple[float, float]:
    """Run a Python script in a process of its own; return its seconds and its peak memory, without its children."""
    code = f"import sys\n{script}\n{PEAK}"
    begin = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, float(done.stdout.rpartition("peak ")[2])


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


def write_job(folder: Path, source: Path, tokenizer: Path) -> Path:
    """Write a workflow over a source."""
    folder.mkdir()
    (folder / "workflow.toml").write_text(
        f"[pretokenize]\nsources = ['{source}']\ncontext_length = 512\ntokenizer.from = '{tokenizer}'\n"
    )
    return folder


def tokenize(folder: Path) -> None:
    """Pretokenize JSONL to the finished artifact."""
    one, ten = write_corpora(folder)
    tokenizer = folder / "tokenizer"
    job, large = write_job(folder / "one", one, tokenizer), write_job(folder / "ten", ten, tokenizer)
    definition = str(tokenizer / "tokenizer.json")
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "mlxflow": lambda: run(OURS, "fast", cwd=job),
        "mlxflow, tokenizers alone": lambda: run(OURS, "library", cwd=job),
        "datasets.map, 2 processes": lambda: run(DATASETS, str(one), definition, "transformers"),
        "... with encode_batch_fast": lambda: run(DATASETS, str(one), definition, "tokenizers"),
        "mlx-lm, one encode a sample": lambda: run(MLX_LM, str(one), definition),
        "mlxflow, ten times": lambda: run(OURS, "fast", cwd=large),
    }
    peers = {
        "datasets.map, ten times": lambda: run(DATASETS, str(ten), definition, "transformers"),
        "mlx-lm, ten times": lambda: run(MLX_LM, str(ten), definition),
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


# --- one changed file


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
        whole = run(OURS, engine, cwd=job)[0]
        changed = []
        for number in range(ROUNDS):
            (notes / "0500.txt").write_text(f"another text for {engine}, number {number}")
            changed.append(run(again, engine, cwd=job)[0])
            assert "tokenized_files = 1\n" in (job / "artifacts/pretokenize/report.toml").read_text()
        median = statistics.median(changed)
        print(f"1,000 files, engine {engine}: all {whole:.2f} s, one changed {median:.2f} s ({median / whole:.3f})")


# --- loading


def _rows(count: int, length: int, folder: Path) -> Any:
    from mlxflow.data.token_file import Rows
    from mlxflow.storage.tensor_reading import map_tensor
    from mlxflow.storage.tensor_writing import write_arrays

    path = folder / f"rows-{length}.safetensors"
    tokens = np.random.default_rng(0).integers(0, 2048, (count, length)).astype(np.uint16)
    write_arrays(path, {"tokens": tokens, "marks": np.full((count, length), 3, np.uint8)}, {})
    return Rows(map_tensor(path, "tokens"), map_tensor(path, "marks"))


def _microseconds(act: Callable[[int], object], count: int) -> float:
    begin = time.perf_counter()
    for number in range(count):
        act(number)
    return (time.perf_counter() - begin) / count * 1e6


def load(folder: Path) -> None:
    """Gather batches, wait for them, and train with them."""
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    import mlx.core as mx

    from mlxflow.data.loader import Loader, Order

    for count, length, batch_size in ((170_000, 513, 32), (42_000, 2049, 64)):
        rows = _rows(count, length, folder)
        order = Order(rows.num_rows, seed=0)
        plain = rows.take(np.arange(batch_size))
        places: list[NDArray[np.int64]] = [order.rows(i * batch_size, batch_size) for i in range(400)]
        acts: dict[str, Callable[[int], object]] = {
            "copy of the same bytes": lambda i, p=plain: (p.tokens.copy(), p.marks.copy()),  # type: ignore[misc]
            "batch on the host": lambda i, r=rows, o=order, b=batch_size: r.take(o.rows(i * b, b)),  # type: ignore[misc]
            "batch as MLX arrays": lambda i, r=rows, p=places: mx.eval([mx.array(x) for x in r.take(p[i])]),  # type: ignore[misc]
        }
        items = _torch_items(rows, batch_size)
        if items is not None:
            acts["torch DataLoader over items"] = items
        found: dict[str, list[float]] = {name: [] for name in acts}
        for _ in range(9):
            for name, act in random.sample(list(acts.items()), len(acts)):
                found[name].append(_microseconds(act, 300 if "torch" not in name else 30))
        base = statistics.median(found["copy of the same bytes"])
        for name, rounds in found.items():
            median = statistics.median(rounds)
            print(f"{batch_size} x {length}  {name:28} {median:8.1f} us  {median / base:6.1f} x a copy")
        _wait(rows, batch_size, Loader)
    _train(folder)


def _torch_items(rows: Any, batch_size: int) -> Callable[[int], object] | None:
    try:
        import torch
    except ImportError:
        return None

    class Items(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return int(rows.num_rows)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(rows.tokens[index].astype(np.int32))

    batches = iter(torch.utils.data.DataLoader(Items(), batch_size=batch_size, shuffle=True))
    next(batches)
    return lambda _: next(batches)


def _wait(rows: Any, batch_size: int, loader_class: Any) -> None:
    """Wait for batches in a loop with a step of 15 ms."""
    with loader_class(rows, batch_size=batch_size, seed=0, workers=8, prefetch_batches=4) as loader:
        next(loader)
        begin, waited = time.perf_counter(), loader.waited_seconds
        fetched = 0.0
        for _ in range(100):
            before = time.perf_counter()
            next(loader)
            fetched += time.perf_counter() - before
            time.sleep(0.015)
        seconds = time.perf_counter() - begin
    print(
        f"{batch_size} x {rows.tokens.shape[1]}  15 ms steps: waited "
        f"{(loader.waited_seconds - waited) / 100 / 0.015:.3%} of a step, whole call {fetched / 100 / 0.015:.2%}; "
        f"{100 / seconds:.1f} of 66.7 steps a second"
    )


def _train(folder: Path) -> None:
    """Train with the loader and on one batch that is on the device already, in turns."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from mlxflow.data.loader import Loader
    from mlxflow.models import model_folder
    from mlxflow.models.new_model import ModelConfig, llama_config
    from mlxflow.training.objective import plain_objective
    from mlxflow.training.optimizers import Update
    from mlxflow.training.step import Step

    is_gpu = mx.default_device() == mx.gpu  # there a model whose step takes about 15 ms
    context_length, width, num_layers = (512, 512, 8) if is_gpu else (64, 128, 2)
    rows = _rows(20_000, context_length + 1, folder)
    config = llama_config(
        ModelConfig(
            hidden_size=width,
            num_layers=num_layers,
            num_heads=width // 64,
            num_kv_heads=width // 64,
            intermediate_size=2 * width,
        ),
        vocab_size=2048,
        context_length=context_length,
    )
    model = model_folder.build(config, seed=0)
    update = Update(model, optim.AdamW(1e-4), max_grad_norm=1.0, has_masters=False)
    step = Step(model, update, plain_objective(masks_documents=False))
    ratios, waits = [], []
    with Loader(rows, batch_size=32, seed=0, workers=8, prefetch_batches=4) as loader:
        fixed = next(loader)

        def seconds(next_batch: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            for _ in range(8):
                batch = next_batch()
                outcome = step.update(step.compute(batch.tokens, batch.marks))
                mx.async_eval(outcome, step.state)
            mx.eval(step.state)
            return time.perf_counter() - begin

        seconds(lambda: fixed)
        step_seconds = seconds(lambda: fixed) / 8
        for number in range(14):
            waited = loader.waited_seconds
            if number % 2:
                loaded, repeated = seconds(lambda: next(loader)), seconds(lambda: fixed)
            else:
                repeated, loaded = seconds(lambda: fixed), seconds(lambda: next(loader))
            ratios.append(repeated / loaded)
            waits.append((loader.waited_seconds - waited) / loaded)
    print(
        f"training steps ({step_seconds * 1e3:.1f} ms) a second with the loader: {statistics.median(ratios):.4f} of "
        f"those on one repeated batch (rounds {min(ratios):.3f} to {max(ratios):.3f}); "
        f"waiting {statistics.median(waits):.3%} of the time"
    )


# --- packing


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
    from tokenizers import Tokenizer

    from mlxflow.data.bin_packing import best_fit, cut
    from mlxflow.data.encoder import choose_encoder

    if not (folder / "tokenizer").exists():
        write_corpora(folder)
    definition = (folder / "tokenizer/tokenizer.json").read_text()
    Tokenizer.from_str(definition)
    documents = [json.loads(line)["text"] for line in (folder / "one.jsonl").read_text().splitlines()]
    pieces = [part for text in documents for part in text.split("\n\n\n")]
    encoder = choose_encoder(definition, threads=2)
    for kind, parts in (("files", documents), ("definitions", [part for part in pieces if part.strip()])):
        lengths = (np.diff(encoder.encode(parts, special=False)[1]) + 1).tolist()
        for context_length in (512, 2048):
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
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(int) + 1, 2049).tolist()
    for capacity in (513, 2049):
        fitting = [min(n, capacity) for n in lengths]
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            best_fit(fitting, capacity)
            seconds.append(time.perf_counter() - begin)
        print(f"a million documents into rows of {capacity}: {statistics.median(seconds):.2f} s")


PARTS: dict[str, Callable[[Path], None]] = {"tokenize": tokenize, "change": change, "load": load, "pack": pack}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[name](Path(scratch))
