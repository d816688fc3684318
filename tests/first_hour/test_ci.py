"""The first hour of a user who wants every push built."""

import re

import pytest
import yaml

from tests.first_hour.conftest import Newcomer

pytestmark = pytest.mark.first_hour


def test_the_workflow_for_github_builds_and_a_second_push_builds_nothing(newcomer: Newcomer) -> None:
    newcomer.types("mlxflow init project --template ci")
    workflow = yaml.safe_load((newcomer.folder / "project/.github/workflows/mlxflow.yml").read_text())
    install, key, build = (step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step)
    assert install == "pip install mlxflow"  # the wheel here
    output = newcomer.folder / "output"
    newcomer.types(f"cd project\n{key}", GITHUB_OUTPUT=str(output))
    assert re.fullmatch(r"key=\S+\n", output.read_text())
    assert build == "mlxflow build"
    newcomer.types(f"cd project && {build}")
    newcomer.assert_improved("project")
    lock = (newcomer.folder / "project/mlxflow.lock").read_bytes()
    assert (newcomer.folder / "project/artifacts/index.html").is_file()
    assert newcomer.is_fresh("project")
    assert (newcomer.folder / "project/mlxflow.lock").read_bytes() == lock
