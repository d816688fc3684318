"""The first hour of a user who wants every push built."""

import pytest

from tests.first_hour.conftest import Newcomer

pytestmark = pytest.mark.first_hour


def test_the_workflow_for_github_builds_and_a_second_push_builds_nothing(newcomer: Newcomer) -> None:
    newcomer.types("mlxflow init project --template ci")
    steps = (newcomer.folder / "project/.github/workflows/mlxflow.yml").read_text()
    commands = [line.split("run: ")[1] for line in steps.splitlines() if "run: " in line]
    assert commands == ["pip install mlxflow", "mlxflow build"]  # the first one is the wheel here
    newcomer.types(f"cd project && {commands[1]}")
    newcomer.assert_improved("project")
    lock = (newcomer.folder / "project/mlxflow.lock").read_bytes()
    assert (newcomer.folder / "project/artifacts/index.html").is_file()
    assert newcomer.is_fresh("project")
    assert (newcomer.folder / "project/mlxflow.lock").read_bytes() == lock
