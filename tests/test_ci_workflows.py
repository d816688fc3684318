"""The CI workflows' shell steps are run under bash as on a Mac, with stand-ins for the programs they call."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

CI = ".github/workflows/ci.yml"
TEMPLATE = "mlxflow/cli/templates/github.yml"
FILES = [CI, ".github/workflows/release.yml", TEMPLATE]

#: The least version of each action whose runtime GitHub still runs.
LEAST = {"checkout": 6, "setup-python": 6, "cache": 5, "upload-artifact": 7, "download-artifact": 7}

#: Programs that a Mac has, and the stand-ins of which note their calls and succeed; others are not found.
BASICS = (
    "bash",
    "cat",
    "cp",
    "dirname",
    "env",
    "grep",
    "head",
    "ls",
    "mkdir",
    "mktemp",
    "rm",
    "sh",
    "tail",
    "tee",
    "wc",
)
NOTED = ("pip", "ruff", "mypy", "lint-imports", "zensical", "pytest", "mlxflow", "doit", "python")

#: A program that notes its call; some print or write what the steps read.
_STAND_IN = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >> "$CALLS"
case "$name $*" in
    "$FAILS"*) exit 1 ;;
    "uname ") echo Darwin ;;
    "uname -sm") echo Darwin arm64 ;;
    "python3 -m venv "*) mkdir -p "$3/bin"; for each in $NOTED; do cp "$0" "$3/bin/$each"; done ;;
    "doit cache-key "*) echo "$2-0123456789abcdef" ;;
    "doit ") mkdir -p artifacts; echo page > artifacts/index.html ;;
    "mlxflow init "*) mkdir -p "$2" ;;
    "mlxflow generate "*) echo "def f(x): return x" ;;
    "mlxflow doctor --report "*) echo "{}" > "$3"; echo "| a | row |" ;;
esac
"""


class Mac:
    """A folder with the repository's scripts, and a PATH with only what a Mac has.

    Args:
        folder: of the test.
        fails: the beginning of the calls that fail.
    """

    def __init__(self, folder: Path, fails: str = "nothing") -> None:
        self.folder, self.programs, self._calls = folder / "checkout", folder / "bin", folder / "calls"
        (self.folder / ".ci").mkdir(parents=True)
        (self.folder / "tests").mkdir()
        for name in (".ci/run", "dodo.py", "tests/tiny.toml", "requirements.lock"):
            shutil.copy(REPOSITORY / name, self.folder / name)
        self.programs.mkdir()
        for name in (*BASICS, "basename"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        for name in ("uname", "python3", *NOTED):
            (self.programs / name).write_text(_STAND_IN)
            (self.programs / name).chmod(0o755)
        self._calls.touch()
        for name in ("output", "summary"):
            (folder / name).touch()
        (folder / "temp").mkdir()
        self._environment = {
            "PATH": str(self.programs),
            "CALLS": str(self._calls),
            "FAILS": fails,
            "NOTED": " ".join(NOTED),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
            "RUNNER_TEMP": str(folder / "temp"),
            "TMPDIR": str(folder / "temp"),
            "HOME": str(folder),
        }

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run a step as GitHub does: a failing command ends it."""
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


def _steps(name: str) -> list[dict[str, Any]]:
    jobs = yaml.safe_load((REPOSITORY / name).read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def _scripts(name: str) -> dict[str, str]:
    return {step.get("name", step["run"]): step["run"] for step in _steps(name) if "run" in step}


def test_every_step_of_ci_runs_on_a_mac(tmp_path: Path) -> None:
    mac = Mac(tmp_path)
    for name, script in _scripts(CI).items():
        result = mac.run(script)
        assert (result.returncode, result.stderr) == (0, ""), name
    calls = "\n".join(mac.calls)
    for expected in (
        "pytest -n 3\n", "doit cache-key report\n", "doit \n", "mlxflow build\n", "pytest -m gpu -n 2\n",
        "python -m mlxflow.kernels.verification ", "mlxflow doctor --report kernels-doctor.json",
    ):  # fmt: skip
        assert expected in calls + "\n", expected
    assert not re.search("apt-get|sudo|ldconfig|OPENBLAS", calls)
    assert (tmp_path / "output").read_text() == "key=report-0123456789abcdef\n"
    assert (tmp_path / "summary").read_text() == "| a | row |\n"
    assert (mac.folder / "kernels-doctor.json").exists()


def test_the_steps_of_the_template_run_on_a_mac(tmp_path: Path) -> None:
    mac = Mac(tmp_path)
    for name, script in _scripts(TEMPLATE).items():
        result = mac.run(script)
        assert (result.returncode, result.stderr) == (0, ""), name
    assert mac.calls == ["pip install mlxflow", "doit cache-key report", "mlxflow build"]
    assert (tmp_path / "output").read_text() == "key=report-0123456789abcdef\n"


@pytest.mark.parametrize(
    "fails",
    [
        "python3 .ci/audit.py", "python3 -m venv", "pip install -q --require-hashes", "pip install -q -e",
        "python -m compileall -q mlxflow", "ruff", "mypy", "lint-imports", "zensical", "doit", "mlxflow generate",
        "pytest -q -n 0 --collect-only", "pytest -n 3",
    ],
)  # fmt: skip
def test_a_failing_part_of_ci_fails_it_also_where_it_runs_beside_others(tmp_path: Path, fails: str) -> None:
    mac = Mac(tmp_path, fails)
    assert mac.run(".ci/run").returncode == 1
    assert any(call.startswith(fails) for call in mac.calls)
    assert not list((tmp_path / "temp").iterdir())


@pytest.mark.parametrize("fails", ["pytest -m gpu", "python -m mlxflow.kernels.verification"])
def test_a_failing_part_of_the_kernels_step_leaves_all_of_its_files_and_fails_it(tmp_path: Path, fails: str) -> None:
    mac = Mac(tmp_path, fails)
    scripts = _scripts(CI)
    assert mac.run(scripts["An environment from the lock"]).returncode == 0
    (script,) = (script for script in scripts.values() if "mlxflow.kernels.verification" in script)
    assert mac.run(script).returncode == 1
    assert {path.name for path in mac.folder.glob("kernels-*")} == {"kernels-tests.txt", "kernels-proof.jsonl"}


def test_a_key_that_cannot_be_computed_fails_its_step(tmp_path: Path) -> None:
    mac = Mac(tmp_path)
    (mac.programs / "doit").write_text("#!/bin/sh\nexit 2\n")
    (script,) = (script for script in _scripts(TEMPLATE).values() if "cache-key" in script)
    assert mac.run(script).returncode == 2
    assert (tmp_path / "output").read_text() == ""


@pytest.mark.parametrize("name", FILES)
def test_no_action_runs_on_a_runtime_that_github_has_removed(name: str) -> None:
    used = re.findall(r"uses: actions/([\w-]+)@\w+  # v(\d+)", (REPOSITORY / name).read_text())
    assert used
    assert [(action, version) for action, version in used if int(version) < LEAST.get(action, 0)] == []


def test_what_the_kernels_did_is_always_uploaded() -> None:
    uploads = [step for step in _steps(CI) if "upload-artifact" in step.get("uses", "")]
    assert [step["with"]["name"].partition("-")[0] for step in uploads] == ["kernels", "reports"]
    assert [step["if"] for step in uploads] == ["always()"] * 2


@pytest.mark.parametrize("name", [CI, TEMPLATE])
def test_the_key_of_the_cache_is_that_of_doit(name: str) -> None:
    (cache,) = (step for step in _steps(name) if "actions/cache@" in step.get("uses", ""))
    assert "${{ steps.artifacts.outputs.key }}" in cache["with"]["key"]
    assert "hashFiles" not in (REPOSITORY / name).read_text()


def test_actionlint_has_no_complaint() -> None:
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("actionlint is not installed")
    result = subprocess.run(
        [program, *FILES], cwd=REPOSITORY, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert (result.returncode, result.stdout) == (0, "")
