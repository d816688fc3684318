"""Corpora of natural text that every machine with Python has: the sources of its library and of installed packages."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

CORPUS_BYTES = 31_500_000


def texts() -> Iterator[str]:
    """Yield the text of every Python source on this machine's path, the library first, each once."""
    seen: set[int] = set()
    for root in [str(Path(os.__file__).parent), *sys.path[1:]]:
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


def write_job(folder: Path, source: Path, tokenizer: Path) -> Path:
    """Write a workflow over a source."""
    folder.mkdir()
    (folder / "workflow.toml").write_text(
        f"[pretokenize]\nsources = ['{source}']\ncontext_length = 512\ntokenizer.from = '{tokenizer}'\n"
    )
    return folder
