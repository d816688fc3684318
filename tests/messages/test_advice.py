import re

from mlxflow.messages.advice import about_workflow, advise_build, command
from tests.conftest import REPOSITORY


def test_the_advised_command_needs_no_dodo_py() -> None:
    assert advise_build("quantize:q4") == "Run: mlxflow build quantize:q4"


def test_an_advised_command_names_another_workflow_file() -> None:
    with about_workflow("runs/my sweep.toml"):
        assert advise_build("train") == "Run: mlxflow build train --workflow 'runs/my sweep.toml'"
        assert command("report --open") == "mlxflow report --open --workflow 'runs/my sweep.toml'"
    assert advise_build("train") == "Run: mlxflow build train"


def test_no_message_advises_to_build_by_doit() -> None:
    files = [*(REPOSITORY / "mlxflow").rglob("*.py"), *(REPOSITORY / "tasks").glob("*.py")]
    advice = re.compile(r"Run: doit [a-z{]")
    assert [path.name for path in files if advice.search(path.read_text())] == []
