"""What becomes of a run whose output cannot be written, whose locale is not UTF-8 or whose folder is read-only."""

import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chain import Chain
from tests.conftest import REPOSITORY, write_workflow

FULL = "No space left on device. Make room or choose another folder.\n"

#: A locale of ASCII, without the two ways in which Python passes over it.
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `doit ...` or `mlxflow ...` by a shell that returns the exit code of that, not of what reads from it."""
    full = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(folder / "cache"), **environment}
    line = f"set -o pipefail; {sys.executable} -m {command}"
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, encoding="utf-8", check=False, env=full
    )


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


@pytest.fixture(scope="module")
def built_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain whose every stage is built; tests only look at it."""
    made = Chain(tmp_path_factory.mktemp("chain"))
    assert made.doit()[0] == 0
    return made


@needs_full
@pytest.mark.parametrize("verb", ["", " list", " plan", " help", " verify", " clean -n"])
def test_a_full_output_device_is_named_in_the_error(built_chain: Chain, verb: str) -> None:
    result = shell(built_chain.folder, f"doit{verb} >/dev/full")
    assert (result.returncode, result.stderr) == (1, f"standard output: {FULL}")


@needs_full
def test_a_build_with_a_full_output_builds_nothing_and_the_next_run_builds_all(chain: Chain) -> None:
    result = shell(chain.folder, "doit >/dev/full")
    assert (result.returncode, result.stderr) == (1, f"standard output: {FULL}")
    result = shell(chain.folder, "doit 2>/dev/full")
    assert (result.returncode, result.stdout) == (1, ".  s1: never built\n")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    chain.assert_correct()


@pytest.mark.parametrize("reader", ["| head -n 1", "2>&1 | head -n 1", "-n 2 2>&1 | head -n 1"])
def test_a_build_whose_output_pipe_closes_stops_between_stages(chain: Chain, reader: str) -> None:
    result = shell(chain.folder, f"doit {reader}")
    assert (result.returncode, result.stdout) == (141, ".  s1: never built\n")
    assert result.stderr in ("", "at work on s1\n", "at work on s1\nat work on s2\n")
    there = [number for number in range(1, 7) if chain.path(number).exists()]
    assert [chain.path(number).read_bytes() for number in there] == [chain.expected()[number] for number in there]
    missing = [number for number in range(1, 7) if number not in there]
    ran = chain.numbers_that_run()
    # Of two threads one may still publish an artifact when the other ends doit: it has no record, and is built again
    assert ran == missing or ("-n 2" in reader and set(ran) > set(missing))
    assert not list(chain.folder.glob("artifacts/.*.partial"))
    chain.assert_correct()


@needs_full
@pytest.mark.parametrize("call", ["--help", "check --help"])
def test_help_that_cannot_be_printed_is_an_error(tmp_path: Path, call: str) -> None:
    result = shell(tmp_path, f"mlxflow {call} >/dev/full")
    assert (result.returncode, result.stderr) == (1, f"standard output: {FULL}")
    result = shell(tmp_path, f"mlxflow {call} | exec true")
    assert (result.returncode, result.stderr) in ((141, ""), (0, ""))  # the reader may end after it was printed


@needs_full
@pytest.mark.parametrize(
    "call", ["mlxflow check --workflow none.toml", "mlxflow nope", "doit list --nope", "doit nope", "doit info"]
)
def test_an_invalid_call_exits_with_2_even_without_output(built_chain: Chain, call: str) -> None:
    assert shell(built_chain.folder, f"{call} 2>/dev/full").returncode == 2


def test_under_any_locale_names_lead_to_the_same_files_and_artifacts_are_equal(tmp_path: Path) -> None:
    text = """
        [pretokenize]
        sources = ["nötes", "$MORE/*.txt"]
        context_length = 16
        tokenizer = { vocab_size = 300 }
    """
    files = {}
    more = {"MORE": "mehr-ü"}
    for name, first in (("ascii", ASCII), ("utf-8", {})):
        folder = tmp_path / name
        folder.mkdir()
        write_workflow(folder).write_text(text, encoding="utf-8")
        (folder / "notes").rename(folder / "nötes")
        (folder / "mehr-ü").mkdir()
        (folder / "nötes/00.txt").rename(folder / "mehr-ü/日本.txt")
        undecodable = folder / "nötes" / os.fsdecode(b"\xff.txt")
        with suppress(OSError):  # a file system that takes UTF-8 alone
            shutil.copy(folder / "nötes/01.txt", undecodable)
        assert shell(folder, "doit pretokenize", **more, **first).returncode == 0
        for locale in ({}, ASCII):
            plan = shell(folder, "doit plan pretokenize", **more, **locale)
            assert (plan.returncode, plan.stdout) == (0, "nothing to do: 1 stages are fresh\n")
        files[name] = (folder / "artifacts/pretokenize/files.txt").read_text(encoding="utf-8")
    assert files["ascii"] == files["utf-8"]
    names = set(files["ascii"].splitlines())
    assert {"nötes/02.txt", "mehr-ü/日本.txt"} < names
    assert (r"nötes/\xff.txt" in names) == undecodable.exists()
    again = shell(tmp_path / "utf-8", "doit reproduce pretokenize", **more, **ASCII)
    assert (again.returncode, again.stdout) == (0, "pretokenize: reproduced, every tensor is equal\n")


def test_under_any_locale_names_and_texts_on_the_command_line_are_utf_8(tmp_path: Path) -> None:
    (tmp_path / "ü").mkdir()
    write_workflow(tmp_path / "ü")
    result = shell(tmp_path, "mlxflow check --workflow ü/workflow.toml", **ASCII)
    assert (result.returncode, result.stderr) == (0, "")
    shutil.copy(tmp_path / "ü/dodo.py", tmp_path)
    result = shell(tmp_path, "doit list workflow=ü/workflow.toml", **ASCII)
    assert (result.returncode, result.stderr) == (0, "")
    result = shell(tmp_path, "mlxflow generate ü --prompt $'\\xff'")
    assert (result.returncode, result.stderr) == (
        2,
        r"generate: --prompt = '\udcff': expected UTF-8. Write it as UTF-8." + "\n",
    )


def test_a_folder_of_undecodable_bytes_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff")
    try:
        chain = Chain(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert chain.numbers_that_run() == [1, 2, 3, 4, 5, 6]
    assert chain.doit("plan")[1] == "nothing to do: 6 stages are fresh\n"
    chain.assert_correct()
    assert chain.doit("pack", "s1", str(tmp_path / "s1.tar"))[0] == 0


def _unprivileged() -> list[str]:
    """Return what a command begins with for permissions to count, which they do not for root."""
    if os.geteuid():
        return []
    found = shutil.which("setpriv")
    if not found:
        pytest.skip("root may write everywhere, and there is no setpriv to take that away")
    return [found, "--bounding-set=-dac_override,-dac_read_search,-fowner"]


def _make_read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)


def test_in_a_read_only_checkout_only_commands_that_write_fail_with_one_line(tmp_path: Path) -> None:
    before = _unprivileged()
    chain = Chain(tmp_path / "chain")
    assert chain.doit()[0] == 0
    chain.assert_correct()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    denied = "Permission denied. Let it be written or choose another folder.\n"

    def doit(*arguments: str) -> tuple[int, str, str]:
        command = [*before, sys.executable, "-B", "-m", "doit", *arguments]
        result = subprocess.run(command, cwd=chain.folder, capture_output=True, text=True, check=False, env=environment)
        return result.returncode, result.stdout, result.stderr

    _make_read_only(chain.folder)
    try:
        assert doit() == (0, "".join(f"-- s{number}\n" for number in range(1, 7)), "")
        assert doit("plan") == (0, "nothing to do: 6 stages are fresh\n", "")
        assert doit("verify") == (0, "6 files of 6 stages read, 0 damaged\n", "")
        packed = tmp_path / "s1.tar"
        assert doit("pack", "s1", str(packed)) == (0, f"s1: 1 files packed into {packed}\n", "")
        assert doit("pack", "s1", "s1.tar") == (
            2,
            "",
            "s1.tar: cannot be written (Permission denied). Name another file.\n",
        )
        assert doit("clean", "s1") == (1, "s1 - removing artifacts/s1\n", f"artifacts/s1/a: {denied}")
        code, out, err = doit("reproduce", "s1")
        assert (code, out) == (1, "")
        assert err.startswith("artifacts/.mlxflow/reproduce-")
        assert err.endswith(f": {denied}")
        assert doit("forget", "s1")[::2] == (1, f"artifacts/.mlxflow/state.jsonl: {denied}")
        chain.assert_correct()
        assert doit("plan")[1] == "nothing to do: 6 stages are fresh\n"
    finally:
        for path in (chain.folder, *chain.folder.rglob("*")):
            path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o200)
