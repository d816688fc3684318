"""Which stages run after which edit: real doit, the real stages, in a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, made_once

PRETOKENIZE, TRAIN, Q4, Q8, PROFILE, BENCHMARK, REPORT = ALL = (
    "pretokenize",
    "train",
    "quantize:q4",
    "quantize:q8",
    "profile",
    "benchmark",
    "report",
)


class Job:
    """A folder with a workflow, and doit in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workflow = folder / "workflow.toml"

    def doit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "doit", *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)

    def stages_that_run(self, *tasks: str) -> list[str]:
        result = self.doit(*tasks)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.findall(r"^\.  ([\w:.-]+): ", result.stdout, re.MULTILINE)

    def replace(self, old: str, new: str) -> None:
        text = self.workflow.read_text()
        assert text.count(old) == 1, old
        self.workflow.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job whose every stage is fresh, which no row changes."""
    return Job(made_once(tmp_path_factory, "staleness", _build))


def _build(folder: Path) -> None:
    shutil.copy(REPOSITORY / "dodo.py", folder)
    text = (REPOSITORY / "tests" / "tiny.toml").read_text()
    text = text.replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]', 1)
    text = text.replace("convergence_steps = 4", "convergence_steps = 0", 1)  # every second row takes the benchmark
    text = text.replace("[report]\n", "[report]\nmodels = []\nnum_prompts = 1\n")  # samples take long
    (folder / "workflow.toml").write_text(text)
    (folder / "notes").mkdir()
    for number in range(20):
        lines = [f"note {number} line {line}: the {line * number % 17}th thing to remember" for line in range(60)]
        (folder / "notes" / f"{number:02}.txt").write_text("\n".join(lines))
    assert Job(folder).stages_that_run() == list(ALL)


@pytest.fixture(scope="module")
def matrix_template(template: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same with one matrix of variants more."""
    made = Job(Path(shutil.copytree(template.folder, tmp_path_factory.mktemp("matrix") / "job")))
    made.replace("[profile]", f"{MATRIX}[profile]")
    added = ("quantize:q-bits5-group_size32", "quantize:q-bits6-group_size32")
    assert made.stages_that_run() == [*added, BENCHMARK, REPORT]
    return made


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Job]:
    """A copy of a template for one row, so that rows run in any order and on any worker."""
    edit = request.node.callspec.params["edit"]
    name = "matrix_template" if edit in OF_A_MATRIX else "template"
    made = Job(Path(shutil.copytree(request.getfixturevalue(name).folder, tmp_path / "job")))
    yield made
    assert made.stages_that_run() == []


MATRIX = '[[quantize]]\nname = "q"\nmatrix = { bits = [5, 6], group_size = [32] }\n'

#: The rows that begin with a matrix.
OF_A_MATRIX = ("a value more in a matrix", "an exclusion", "no matrix any more")


def _list(job: Job) -> None:
    assert job.doit("list", "--all", "--status").returncode == 0


def _touch(job: Job, name: str) -> None:
    assert job.stages_that_run() == []  # so that the digests of this folder are known
    os.utime(job.folder / name, (1, 1))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_last_bit_unseen(job: Job, name: str) -> None:
    assert job.stages_that_run() == []
    path = job.folder / name
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _as_if_built_with_another_mlx(job: Job) -> None:
    journal = job.folder / "artifacts/.mlxflow/state.jsonl"
    text = journal.read_text()
    assert f'"mlx":"{version("mlx")}"' in text
    journal.write_text(text.replace(f'"mlx":"{version("mlx")}"', '"mlx":"0.30.1"'))


def _without_the_hidden_folder(job: Job) -> None:
    shutil.rmtree(job.folder / "artifacts/.mlxflow")


def _merge_conflict(job: Job) -> None:
    """Commit another machine's lock on another branch, merge it, and lose the hidden folder."""
    lock = job.folder / "mlxflow.lock"
    ours = lock.read_text().splitlines(keepends=True)
    theirs = [re.sub(r'"[0-9a-f]{32}"', f'"{0:032}"', line) for line in ours]
    half = len(ours) // 2
    lock.write_text("".join([*ours[:half], "<<<<<<< HEAD\n", *theirs[half:], "=======\n", *ours[half:], ">>>>>>> x\n"]))
    _without_the_hidden_folder(job)


EDITS: dict[str, tuple[Callable[[Job], object], tuple[str, ...]]] = {
    "nothing": (lambda job: None, ()),
    "a look at what is stale": (_list, ()),
    "a comment": (lambda job: job.replace("[profile]", "# measured again\n[profile]"), ()),
    "the order of keys": (
        lambda job: job.replace("num_steps = 20\nwarmup_steps = 2\n", "warmup_steps = 2\nnum_steps = 20\n"),
        (),
    ),
    "the name shown in reports": (lambda job: job.replace('name = "tiny"', 'name = "small"'), (REPORT,)),
    "trackers": (lambda job: job.replace("[profile]", '[tracking]\nto = ["tensorboard"]\n[profile]'), ()),
    "touched source": (lambda job: _touch(job, "notes/03.txt"), ()),
    "touched artifact": (lambda job: _touch(job, "artifacts/train/model.safetensors"), ()),
    "a default written out": (lambda job: job.replace("[profile]", '[profile]\ninput = "train"'), ()),
    "the benchmark's table": (
        lambda job: job.replace("batch_sizes = [2, 4]", "batch_sizes = [2]"),
        (BENCHMARK, REPORT),
    ),
    "the profile's table": (
        lambda job: job.replace("batch_size = 4\nnum_steps = 3", "batch_size = 3\nnum_steps = 3"),
        (PROFILE, REPORT),
    ),
    "a variant's table": (lambda job: job.replace("bits = 8", "bits = 6"), (Q8, BENCHMARK, REPORT)),
    "a new variant": (
        lambda job: job.replace("[profile]", '[[quantize]]\nname = "q5"\nbits = 5\n[profile]'),
        ("quantize:q5", BENCHMARK, REPORT),
    ),
    "a variant that becomes a matrix": (
        lambda job: job.replace("bits = 8\ngroup_size = 32", "matrix = { bits = [5, 6], group_size = [32] }"),
        ("quantize:q8-bits5-group_size32", "quantize:q8-bits6-group_size32", BENCHMARK, REPORT),
    ),
    "a value more in a matrix": (
        lambda job: job.replace("bits = [5, 6]", "bits = [3, 5, 6]"),
        ("quantize:q-bits3-group_size32", BENCHMARK, REPORT),
    ),
    "an exclusion": (
        lambda job: job.replace("group_size = [32] }", "group_size = [32] }\nexclude = [{ bits = 5 }]"),
        (BENCHMARK, REPORT),
    ),
    "no matrix any more": (
        lambda job: job.replace(MATRIX, ""),
        (BENCHMARK, REPORT),
    ),
    "artifacts and lock without the hidden folder": (_without_the_hidden_folder, ()),
    "the same, and a merge's marks in the lock": (_merge_conflict, ()),
    "another mlx, with equal results": (_as_if_built_with_another_mlx, ALL),
    "train's table": (
        lambda job: job.replace("warmup_steps = 2", "warmup_steps = 3"),
        (TRAIN, Q4, Q8, PROFILE, BENCHMARK, REPORT),
    ),
    "train's logging, which leaves the weights as they are": (
        lambda job: job.replace("eval_every = 10", "eval_every = 0"),
        (TRAIN, REPORT),
    ),
    "a source's text": (lambda job: (job.folder / "notes/03.txt").write_text("another note entirely " * 60), ALL),
    "the seed": (lambda job: job.replace("[workflow]", "[workflow]\nseed = 7"), ALL),
    "deleted pretokenize file": (lambda job: (job.folder / "artifacts/pretokenize/tokenizer.json").unlink(), ALL[:1]),
    "deleted train artifact": (lambda job: shutil.rmtree(job.folder / "artifacts/train"), (TRAIN, REPORT)),
    "a template put beside the trained model": (
        lambda job: (job.folder / "artifacts/train/chat_template.jinja").write_text("{{ messages }}"),
        (TRAIN, REPORT),
    ),
    "an index put beside a variant's model": (
        lambda job: (job.folder / "artifacts/quantize/q4/model.safetensors.index.json").write_text("{}"),
        (Q4,),
    ),
    "a note put beside the trained model": (
        lambda job: (job.folder / "artifacts/train/README.md").write_text("mine"),
        (),
    ),
    "deleted variant": (lambda job: shutil.rmtree(job.folder / "artifacts/quantize/q4"), (Q4,)),
    "deleted benchmark": (lambda job: shutil.rmtree(job.folder / "artifacts/benchmark"), (BENCHMARK, REPORT)),
    "a damaged page": (lambda job: _truncate(job.folder / "artifacts/report/index.html"), (REPORT,)),
    "a page gone from where people look": (lambda job: (job.folder / "artifacts/index.html").unlink(), (REPORT,)),
    "the report's table": (lambda job: job.replace("num_prompts = 1", "num_prompts = 3"), (REPORT,)),
    "truncated model": (lambda job: _truncate(job.folder / "artifacts/train/model.safetensors"), (TRAIN, REPORT)),
    "flipped bit, mtime put back": (
        lambda job: _flip_last_bit_unseen(job, "artifacts/quantize/q8/model.safetensors"),
        (Q8,),
    ),
}


#: Edits that are made by `pytest -m matrix`: each trains or measures several models.
_SLOW = {
    *OF_A_MATRIX,
    "a new variant",
    "a source's text",
    "deleted benchmark",
    "the benchmark's table",
    "a variant that becomes a matrix",
    "a variant's table",
    "another mlx, with equal results",
    "the seed",
    "train's table",
}


@pytest.mark.parametrize("edit", [pytest.param(edit, marks=[pytest.mark.matrix] * (edit in _SLOW)) for edit in EDITS])
def test_an_edit_reruns_the_stages_it_makes_stale_and_no_other(job: Job, edit: str) -> None:
    change, expected = EDITS[edit]
    change(job)
    assert job.stages_that_run() == list(expected)


UNDONE: dict[str, tuple[Callable[[Job], object], Callable[[Job], object]]] = {
    "pretokenize's table": (
        lambda job: job.replace("context_length = 16", "context_length = 12"),
        lambda job: job.replace("context_length = 12", "context_length = 16"),
    ),
    "a new source": (
        lambda job: (job.folder / "notes/new.txt").write_text("a new note in the folder " * 60),
        lambda job: (job.folder / "notes/new.txt").unlink(),
    ),
    "a source gone": (
        lambda job: (job.folder / "notes/07.txt").rename(job.folder / "07.txt"),
        lambda job: (job.folder / "07.txt").rename(job.folder / "notes/07.txt"),
    ),
}


@pytest.mark.parametrize("edit", UNDONE)
def test_an_edit_that_is_undone_leaves_the_stages_after_it_fresh(job: Job, edit: str) -> None:
    """That other tokens make all that follows stale is what "a source's text" shows."""
    change, undo = UNDONE[edit]
    tokens = job.folder / "artifacts/pretokenize/train.safetensors"
    before = tokens.read_bytes()
    change(job)
    assert job.stages_that_run(PRETOKENIZE) == [PRETOKENIZE]
    assert tokens.read_bytes() != before
    undo(job)
    assert job.stages_that_run() == [PRETOKENIZE]
    assert tokens.read_bytes() == before
