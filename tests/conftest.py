"""What the tests share: a small text, and the whole chain built from it once."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

from mlxflow.device import cpu_backend
from mlxflow.ops import mlx_lm_import

cpu_backend.prepare()  # before any test imports mlx
cpu_backend.prepare_compiler()
mlx_lm_import.prepare()  # mlx-lm's own import lowers the limit of open files, and every later process inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job, and then by all below
os.environ["MLX_ENABLE_TF32"] = "0"  # fp32 is fp32 in the tests: on CUDA products of it have 10 bits of mantissa else

# By default the same examples in every run; HYPOTHESIS_PROFILE=long looks for new ones.
_UNTIMED = hypothesis.settings(
    deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine fails no test
hypothesis.settings.register_profile("brief", _UNTIMED, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("long", _UNTIMED, max_examples=20_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "brief"))

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_search_path() -> Iterator[None]:
    """Let no later test's processes inherit what `mlxflow.__main__.main` sets for its own."""
    before = os.environ.get("PYTHONSAFEPATH")
    yield
    if before is None:
        os.environ.pop("PYTHONSAFEPATH", None)
    else:
        os.environ["PYTHONSAFEPATH"] = before


@pytest.fixture(autouse=True)
def _own_buffers() -> None:
    """Let no test get a buffer that an earlier one left in MLX's cache: it may be twice as large as what is needed."""
    if mlx := sys.modules.get("mlx.core"):
        mlx.clear_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the processes that a failed test has left: a training on two ranks would slow down all later tests."""
    begin, failed = time.time(), item.session.testsfailed
    outcome = yield
    if item.session.testsfailed > failed:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.create_time() > begin - 2:  # the time of the start of the machine is known to a second
                    process.kill()
    return outcome


TINY = REPOSITORY / "tests" / "tiny.toml"
STAGES = ("pretokenize", "train", "quantize:q4", "quantize:q8", "profile", "benchmark", "report")


def rest_in_matrix(values: Iterable[Any], *always: Any) -> list[Any]:
    """Return the values of a parameter, of which all but some are tried by `pytest -m matrix` only.

    Args:
        values: all of them; of several parameters together, tuples.
        always: those that a plain `pytest` tries, too.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]),
            marks=[] if value in always else [pytest.mark.matrix],
        )
        for value in values
    ]


def write_notes(folder: Path) -> None:
    """Write a folder of short texts that a small model can learn from."""
    folder.mkdir()
    for number in range(20):
        lines = [f"note {number} line {line}: the {line * number % 17}th thing to remember" for line in range(60)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines))


def write_workflow(folder: Path, text: str | None = None) -> Path:
    """Write a workflow over the notes, the tiny one unless another is given, and return its path."""
    write_notes(folder / "notes")
    shutil.copy(REPOSITORY / "dodo.py", folder)
    path = folder / "workflow.toml"
    path.write_text(text or TINY.read_text().replace("[pretokenize]", '[pretokenize]\nsources = ["notes"]', 1))
    return path


def mlxflow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, as a user would."""
    return _run(folder, "mlxflow", *arguments)


def doit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run doit in a folder, as a user would."""
    return _run(folder, "doit", *arguments)


def _run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A lock of their own: what else runs on this machine must not show in what the tests read.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return this worker's copy of a folder that one worker makes for all of them.

    Args:
        factory: of temporary folders.
        name: of the folder, different for each that is made so.
        make: fills the folder, which is empty.
    """
    shared = factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / name / "job"
    folder.parent.mkdir(exist_ok=True)
    complete = folder.parent / "complete"
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            complete.touch()
    return Path(shutil.copytree(folder, factory.mktemp(f"{name}-copy") / "job"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny workflow whose every stage was run; tests only look at it."""
    folder = made_once(tmp_path_factory, "built", _build)
    before = _content(folder)
    yield folder
    assert _content(folder) == before, "a test changed the folder that the others look at: let it take job_copy"


def _build(folder: Path) -> None:
    write_workflow(folder)
    for stage in STAGES:
        result = mlxflow(folder, "run", stage)
        assert result.returncode == 0, result.stderr


def _content(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder by its name, hidden ones left out."""
    files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in zip(names, files, strict=True)
        if "/." not in name and "__pycache__" not in name
    }


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a tiny workflow of which nothing is built."""
    write_workflow(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def project(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the built folder in which the tests of one module put more workflow files and models."""
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("project"), dirs_exist_ok=True))


@pytest.fixture
def job_copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the built folder, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs the tests of a GPU without one."""
    parser.addoption("--metal", action="store_true", help="run the tests marked gpu on the stand-in for Metal")


def pytest_configure(config: pytest.Config) -> None:
    """Put the stand-in in the place of Metal before the tests are collected, which ask for the device."""
    if config.getoption("--metal"):
        from tests.metal import gpu_session

        gpu_session.begin(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; give the long tests, which do not run by default, an hour each."""
    import mlx.core as mx

    for item in items:
        if any(item.get_closest_marker(name) for name in ("faults", "first_hour", "gpu", "journey", "matrix", "metal")):
            item.add_marker(pytest.mark.timeout(3600))

    if config.getoption("--metal"):
        from tests.metal import gpu_session

        gpu_session.leave_out(items)
    if mx.is_available(mx.gpu):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and MLX finds none here"))


@pytest.fixture(scope="module")
def good_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder; tests copy it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxflow.models import model_folder
    from tests.models.spoilt_folders import LLAMA

    folder = tmp_path_factory.mktemp("good")
    weights: dict[str, mx.array] = dict(tree_flatten(model_folder.build(LLAMA, seed=0).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def llama_folder(good_llama: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be spoilt."""
    return Path(shutil.copytree(good_llama, tmp_path / "model"))
