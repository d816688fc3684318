"""What depends on the number of threads that multiply matrices, and that it is recorded and can be fixed."""

import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from mlxflow.device import cpu_backend
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks import lockfile
from mlxflow.tasks.cache_key import cache_key
from mlxflow.tasks.reproduction import other_threads_message
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import reasons

RESTRICTED = (
    "import os, sys; os.sched_setaffinity(0, {{{cores}}}); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)

PRODUCTS = """
import sys
from mlxflow.device import cpu_backend
if int(sys.argv[1]):
    cpu_backend.fix_threads(int(sys.argv[1]))
cpu_backend.prepare()
import hashlib
import mlx.core as mx
digest = hashlib.sha256()
for rows, inner, columns in ((64, 64, 64), (512, 300, 700), (37, 1111, 53)):
    a, b = (mx.random.normal(shape, key=mx.random.key(0)) for shape in ((rows, inner), (inner, columns)))
    digest.update(bytes(memoryview(mx.matmul(a, b, stream=mx.cpu))))
print(cpu_backend.thread_count(), digest.hexdigest())
"""

needs_blas = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or cpu_backend.prepare() != "libopenblas.so.0",
    reason="needs OpenBLAS, and a system that restricts processes to processors",
)


def _on(cores: int, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python on the first processors that this process has."""
    if sys.platform == "darwin":
        raise NotImplementedError("macOS does not restrict processes to processors")
    own = sorted(os.sched_getaffinity(0))[:cores]
    restricted = [sys.executable, "-c", RESTRICTED.format(cores=", ".join(map(str, own)))]
    cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")} if folder else {}
    environment = {**os.environ, **cache}
    return subprocess.run(
        [*restricted, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@needs_blas
def test_equal_threads_make_equal_bytes_on_any_number_of_processors() -> None:
    on_one, on_all = (_on(cores, "-c", PRODUCTS, "2").stdout for cores in (1, 64))
    assert on_one == on_all
    assert on_one.startswith("2 ")


@needs_blas
def test_as_many_threads_as_processors_compute_unless_it_is_fixed() -> None:
    assert _on(1, "-c", PRODUCTS, "0").stdout.startswith("1 ")
    assert _on(1, "-c", PRODUCTS, "3").stdout.startswith("3 ")


@needs_blas
def test_more_threads_than_the_blas_supports_are_refused_in_one_line() -> None:
    script = "from mlxflow.device import cpu_backend; cpu_backend.fix_threads(1024, key='workflow.threads')"
    last = _on(1, "-c", script).stderr.splitlines()[-1]
    most = last.rpartition(" ")[2].rstrip(".")
    assert last == (
        "mlxflow.messages.errors.WorkflowError: workflow.threads = 1024: "
        f"libopenblas.so.0 computes with {most} at most. "
        f"Use workflow.threads = {most}."
    )


def _set_threads(job: Path, threads: int) -> None:
    workflow = job / "workflow.toml"
    lines = [line for line in workflow.read_text().splitlines() if not line.startswith("threads = ")]
    where = lines.index("[workflow]") + 1
    workflow.write_text("\n".join([*lines[:where], *([f"threads = {threads}"] if threads else []), *lines[where:], ""]))


@needs_blas
def test_the_lock_says_how_many_threads_computed_and_a_workflow_fixes_them(job_copy: Path) -> None:
    _set_threads(job_copy, 2)
    built = _on(1, "-m", "doit", "train", folder=job_copy)
    assert built.returncode == 0, built.stderr
    lock = tomllib.loads((job_copy / "mlxflow.lock").read_text())
    assert (lock["train"]["threads"], "threads" in lock["pretokenize"]) == (2, False)
    again = _on(64, "-m", "doit", "reproduce", "train", folder=job_copy)
    assert again.stdout == "train: reproduced, every tensor is equal\n"
    _set_threads(job_copy, 0)  # as many as there are: what was made is fresh
    assert _on(1, "-m", "doit", "plan", "train", folder=job_copy).stdout == "nothing to do: 2 stages are fresh\n"
    _set_threads(job_copy, 3)
    planned = _on(1, "-m", "doit", "plan", "train", folder=job_copy).stdout
    assert planned.startswith("train: workflow.threads: 2 -> 3 ")
    _set_threads(job_copy, 0)
    differs = "so last bits may differ. Set workflow.threads = 2 for equal ones."
    verified = _on(1, "-m", "doit", "verify", "train", folder=job_copy)
    assert verified.stdout.splitlines()[0] == (
        f"train: the artifact was computed by 2 threads, here it would be 1, {differs}"
    )
    assert verified.returncode == 0
    other = _on(1, "-m", "doit", "reproduce", "train", folder=job_copy)
    assert other.stdout.splitlines()[0] == (
        f"train: the artifact was computed by 2 threads, this build by 1, {differs}"
    )


NODE = Node(
    task="train",
    doc="",
    root=Path(),
    folder="artifacts/train",
    inputs=(),
    outputs=(),
    settings={"seed": 0},
    command=(),
)


@pytest.mark.parametrize(
    ("fixed", "made_by", "reason"),
    [
        (0, {"device": "cpu: a", "threads": 2}, []),
        (0, {"device": "cpu: a"}, []),
        (2, {"device": "cpu: a", "threads": 2}, []),
        (4, {"device": "cpu: a", "threads": 2}, ["workflow.threads: 2 -> 4"]),
        (4, {"device": "cpu: a"}, ["workflow.threads: unknown -> 4"]),
        (4, {"device": "gpu: a"}, []),
        (4, {"device": "unknown"}, []),
    ],
)
def test_an_artifact_made_with_another_than_the_fixed_number_of_threads_is_stale(
    tmp_path: Path, fixed: int, made_by: dict[str, object], reason: list[str]
) -> None:
    node = replace(NODE, root=tmp_path, threads=fixed)
    cache = DigestCache(tmp_path / "digests.json")
    record = {"settings": {"seed": 0, "mlx": version("mlx")}, "inputs": {}, "outputs": {}, **made_by}
    assert list(reasons(node, record, cache)) == reason


def test_the_number_of_threads_survives_the_lock_file() -> None:
    values = {
        "settings": {"seed": 0},
        "inputs": {},
        "outputs": {"a": [3, "ab"]},
        "seconds": 1.0,
        "device": "cpu: a",
        "commit": "c",
        "threads": 4,
    }
    table = lockfile.describe(NODE, values)
    assert table["threads"] == 4
    assert (lockfile.recorded(table) or {})["threads"] == 4
    assert lockfile.recorded(table | {"threads": "many"}) is None
    del values["threads"]
    assert "threads" not in (lockfile.recorded(lockfile.describe(NODE, values)) or {"threads": 0})


def test_a_cache_key_follows_the_fixed_number_where_the_stage_computes(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    keys = [cache_key(replace(NODE, threads=threads), [], cache) for threads in (0, 1, 2)]
    assert len(set(keys)) == 3
    assert cache_key(replace(NODE, threads=2, uses_device=False), [], cache) == keys[0]


@pytest.mark.parametrize(("record", "threads"), [({}, 2), ({"threads": 2}, 2), ({"threads": 2}, None)])
def test_equal_or_unknown_numbers_of_threads_are_not_reported(record: dict[str, int], threads: int | None) -> None:
    assert other_threads_message("train", record, threads, "this build by") == ""
