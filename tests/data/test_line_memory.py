"""A line of JSONL takes at most four times its size, in the whole process, with a tokenizer trained on it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.data.long_words import split_at_words
from mlxflow.data.tokenizer import train_tokenizer

# Batches, threads and engines take the same room with a line of either size
_SHORT_BYTES, _LONG_BYTES = 8_000_000, 16_000_000
# ru_maxrss of a process begins with that of the one that started it; VmHWM does not
_RUN = """
import pathlib, re, resource, sys
from mlxflow.__main__ import main
code = main(["run", "pretokenize"])
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
sys.exit(code)
"""


def _words(size: int) -> str:
    generator = random.Random(0)
    known = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 9))) for _ in range(5000)]
    return " ".join(generator.choices(known, k=size // 6))[:size]


def _peak(folder: Path, line: str) -> int:
    """Return the peak resident size of a process that pretokenizes some lines, one of them a given one."""
    folder.mkdir()
    records = [*(f"a few words of document {number}" for number in range(100)), line]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in records))
    (folder / "workflow.toml").write_text('[pretokenize]\nsources = ["a.jsonl"]\ntokenizer.vocab_size = 300\n')
    done = subprocess.run([sys.executable, "-c", _RUN], cwd=folder, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def test_reading_a_line_takes_at_most_four_times_its_size_in_memory(tmp_path: Path) -> None:
    short, long = (_peak(tmp_path / str(size), _words(size)) for size in (_SHORT_BYTES, _LONG_BYTES))
    more = _LONG_BYTES - _SHORT_BYTES
    assert long - short <= 4 * more, f"{(long - short) / more:.1f} times"


@pytest.mark.parametrize(
    "text",
    [
        _words(200_000),
        "it's  two spaces,\n\nlines\tand 12 345 'll 've - ! ?x " * 4000,
        "中文 \x1c and \u00a0 spaces\x85 of\u2003 kinds\x1f e\u0301 \u0301x " * 4000,
    ],
    ids=["words", "ascii", "others"],
)
def test_training_on_parts_of_a_text_gives_the_same_tokenizer(text: str) -> None:
    parts = list(split_at_words([text]))
    assert len(parts) > 3
    assert "".join(parts) == text
    split = train_tokenizer([], vocab_size=300).pre_tokenizer
    assert split is not None
    whole = [word for word, _ in split.pre_tokenize_str(text)]
    assert [word for part in parts for word, _ in split.pre_tokenize_str(part)] == whole
