"""A newcomer: an empty folder, and an environment with the wheel of this project and what it depends on."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

#: A first hour takes no more commands than these.
MAX_COMMANDS = 4

EXAMPLES = REPOSITORY / "examples"


class Newcomer:
    """Types commands into a shell, in a folder that is empty at first.

    Args:
        folder: the folder.
        programs: the folder of `mlxflow` and `python`.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self._programs = programs
        self.commands: list[str] = []

    def types(self, command: str, *, expects: int = 0, stdin: str = "", **variables: str) -> str:
        """Run a command and return what it prints to standard output.

        Args:
            command: for `sh`.
            expects: its exit code.
            stdin: text that is typed while it runs.
            variables: of the environment.
        """
        self.commands.append(command)
        assert len(self.commands) <= MAX_COMMANDS, self.commands
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PATH": f"{self._programs}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **variables}
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expects, f"$ {command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def is_fresh(self, project: str) -> bool:
        """Return whether a build finds every stage fresh."""
        lines = self.types(f"cd {project} && mlxflow build").splitlines()
        return bool(lines) and all(line.startswith("-- ") for line in lines)

    def report(self, artifact: str) -> dict[str, Any]:
        """Return the figures of an artifact below the folder."""
        return tomllib.loads((self.folder / artifact / "report.toml").read_text())

    def assert_improved(self, project: str) -> None:
        """Assert that the published weights are better on held-out rows than those at the start."""
        figures = self.report(f"{project}/artifacts/train")
        assert figures["last_validation_perplexity"] < figures["first_validation_perplexity"]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which the built wheel is installed, beside what it depends on."""
    folder = tmp_path_factory.mktemp("newcomer")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__", ".git", "artifacts", "*.egg-info", ".*")
    shutil.copytree(REPOSITORY, sources, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    (folder / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", build, str(folder / "wheel")], cwd=sources, check=True, capture_output=True)
    environment = folder / "environment"
    venv.create(environment)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "-q", "--no-index"]
    wheel = next((folder / "wheel").iterdir())
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(place for place in sys.path if "site-packages" in place))
    doit = environment / "bin/doit"  # pip would install it beside mlxflow
    doit.write_text(f"#!{environment / 'bin/python'}\nimport sys\nfrom doit.__main__ import main\nsys.exit(main())\n")
    doit.chmod(0o755)
    return environment / "bin"


@pytest.fixture
def newcomer(programs: Path, tmp_path: Path) -> Newcomer:
    """A user with an empty folder."""
    return Newcomer(tmp_path, programs)


@pytest.fixture(scope="session")
def chat_model(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a chat model: the base of an example, for 64 positions."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(EXAMPLES / "chat-lora", folder / "made", ignore=shutil.ignore_patterns("artifacts"))
    maker = Newcomer(folder / "made", programs)
    maker.types("mlxflow build train --workflow base/workflow.toml")
    model = folder / "model"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    model.mkdir()
    for name in names:
        shutil.copy(folder / "made/base/artifacts/train" / name, model)
    return model
